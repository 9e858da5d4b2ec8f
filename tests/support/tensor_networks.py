"""ONNX files of small networks whose outputs are no class scores, or whose inputs are no images."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

IMAGE = (3, 16, 16)
VIDEO = (3, 4, 8, 8)
CLASSES = ("road", "sky", "tree", "none")


class Segmenter(nn.Module):
    """Scores [B, 4, 8, 8] of images of 16 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()
        )
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the scores."""
        scores: Tensor = self.head(self.body(pixels))
        return scores


class TwoOutputs(nn.Module):
    """A map [B, 6, 8, 8], its best channels as integers [B, 8, 8], and an early sum [B]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 6, 3, 1, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three outputs."""
        features = self.first(pixels)
        maps = self.second(features.relu())
        return maps, maps.argmax(1), features.mean((1, 2, 3))


class Embedder(nn.Module):
    """Tokens [B, 16, 6] of images of 16 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.inner, self.head = nn.Linear(width, width), nn.Linear(width, 6)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the tokens."""
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        tokens = tokens + self.inner(tokens).relu()
        embedded: Tensor = self.head(tokens)
        return embedded


class Pooled(nn.Module):
    """One vector [B, 6] of each image of 16 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = Embedder(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the vectors."""
        vectors: Tensor = self.tokens(pixels).mean(1)
        return vectors


class Video(nn.Module):
    """Class scores [B, 4] of videos [B, 3, 4, 8, 8]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv3d(width, width, 3, 1, 1), nn.ReLU()
        )
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, video: Tensor) -> Tensor:
        """Return the scores."""
        scores: Tensor = self.head(self.body(video).mean((2, 3, 4)))
        return scores


class Wide(nn.Module):
    """A map [B, 8, 192, 192], 1.1 MiB for each image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(3, 8, 12, 12)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the map."""
        maps: Tensor = self.grow(pixels)
        return maps


OUTPUTS: dict[type[nn.Module], tuple[str, ...]] = {
    Segmenter: ("masks",),
    TwoOutputs: ("maps", "best", "mean"),
    Embedder: ("tokens",),
    Pooled: ("vector",),
    Video: ("scores",),
    Wide: ("wide",),
}


def write_tensor_network(
    path: Path, kind: type[nn.Module], width: int, names: Sequence[str] | None = None
) -> Path:
    """Write the ONNX file of a network with random weights, and return its path."""
    torch.manual_seed(width)
    network, names = kind(width).eval(), names or OUTPUTS[kind]
    source = "video" if kind is Video else "pixels"
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(2, *(VIDEO if kind is Video else IMAGE)),),
            file,
            dynamo=False,
            opset_version=17,
            input_names=[source],
            output_names=list(names),
            dynamic_axes={name: {0: "batch"} for name in (source, *names)},
        )
    path.write_bytes(file.getvalue())
    return path


def run_file(path: Path, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Return what ONNX Runtime computes from a file, by the names of the outputs."""
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {session.get_inputs()[0].name: inputs})
    return dict(zip(names, map(np.asarray, values), strict=True))


def random_inputs(count: int, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Return random model inputs."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)
