"""ONNX files of small networks with random weights, and pictures, for tests of own models."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn

SIZE = 32
SHAPE = (3, SIZE, SIZE)
LABELS = ("ankle", "bag", "coat", "dress", "eye")


class Scores(nn.Module):
    """A network of transformers that returns only its class scores."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the scores [B, K]."""
        scores: Tensor = self.network(pixels).logits
        return scores


def _resnet(scale: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = [scale * width for width in (4, 6, 8)]
    config = ResNetConfig(embedding_size=8, hidden_sizes=sizes, depths=[1, 2, 1], num_labels=5)
    return Scores(ResNetForImageClassification(config))


def _vit(width: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=SIZE,
        patch_size=8,
        num_labels=5,
    )
    return Scores(ViTForImageClassification(config))


def _convnext(scale: int) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = [scale * width for width in (4, 6, 8)]
    config = ConvNextConfig(hidden_sizes=sizes, depths=[1, 1, 1], num_labels=5, patch_size=2)
    config.num_stages = 3
    return Scores(ConvNextForImageClassification(config))


def _swin(width: int) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=SIZE,
        patch_size=4,
        embed_dim=width,
        depths=[1, 2],
        num_heads=[2, 2],
        window_size=4,
        num_labels=5,
    )
    return Scores(SwinForImageClassification(config))


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "resnet": _resnet,
    "vit": _vit,
    "convnext": _convnext,
    "swin": _swin,
}


@functools.cache
def network_bytes(kind: str, size: int, *, opset: int = 17, batch: bool = True) -> bytes:
    """Return the ONNX file of a network of random weights; `batch` makes the batch dynamic."""
    torch.manual_seed(size)
    return export(KINDS[kind](size), opset=opset, batch=batch)


def export(
    network: nn.Module, shape: tuple[int, ...] = SHAPE, *, opset: int = 17, batch: bool = True
) -> bytes:
    """Return the ONNX file of a torch module."""
    import io

    file = io.BytesIO()
    axes: dict[str, Any] = {"pixels": {0: "batch"}, "scores": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(2 if batch else 1, *shape),),
            file,
            dynamo=False,
            opset_version=opset,
            input_names=["pixels"],
            output_names=["scores"],
            dynamic_axes=axes if batch else None,
        )
    return file.getvalue()


def write_network(folder: Path, kind: str, size: int, **options: Any) -> Path:
    """Write the ONNX file of a network into a folder, and return its path."""
    path = folder / f"{kind}-{size}.onnx"
    path.write_bytes(network_bytes(kind, size, **options))
    return path


def reference(path: Path, images: np.ndarray) -> np.ndarray:
    """Return what ONNX Runtime computes from the user's own file."""
    session = onnxruntime.InferenceSession(str(path))
    (scores,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(scores)


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Return the first output of a graph with one input."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def random_images(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return random model inputs."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def write_photographs(folder: Path, count: int, seed: int = 0, side: int = 48) -> Path:
    """Write smooth random PNG files into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        small = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((side + 16, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:04d}.png")
    return folder
