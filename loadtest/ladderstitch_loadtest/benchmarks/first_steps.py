"""The first steps of a new user, timed: from own files to the first token and the first answer.

Commands run as a user types them, in processes of their own. Preparing the files is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image
from safetensors.torch import save_file

from ladderstitch.bundles import HOME_VARIABLE, find_bundle
from ladderstitch.client import Client
from ladderstitch.importers.fetch import install_packages
from ladderstitch.importers.fetch_efficientnet import NOT_PHOTOGRAPHS, PHOTOGRAPHS
from ladderstitch.text.hugging_face.architectures import read_architecture
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.vision.dataset import find_photographs
from ladderstitch.vision.bundle import Preprocessing, VisionBundle
from ladderstitch.vision.models.graphs import cached_units, join_units, unit_paths
from ladderstitch_loadtest.servers.processes import ladderstitch_server
from ladderstitch_loadtest.servers.tiny_language import write_byte_tokenizer

LADDERSTITCH = (sys.executable, "-m", "ladderstitch")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 15,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
"""Half of SmolLM2-135M's layers with one token per byte: 53 M parameters, 106 MB in bfloat16."""
FAMILY, SMALL, LARGE = "efficientnet-lite", 0, 2
IMAGES = 200


@dataclass(frozen=True, slots=True)
class Journey:
    """Seconds of one journey; `commands` are those that the user types."""

    commands: tuple[str, ...]
    seconds: dict[str, float]
    megabytes: float
    facts: dict[str, object]

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


def first_token(work: Path, advance: Callable[[str], None]) -> Journey:
    """Time a folder of transformers to its first token, in one command and behind a server."""
    folder = work / "my-llama"
    write_llama(folder)
    prompt = "The capital of France is"
    command = ("generate", prompt, "--local", "--model", str(folder), "--max-tokens", "16")
    advance("generate --local")
    first_s, whole_s, answer = _time_output([*LADDERSTITCH, *command])
    advance("serve")
    started = time.monotonic()
    with ladderstitch_server("--no-ray", "--model", str(folder)) as server:
        ready_s = time.monotonic() - started
        with Client(server.address) as client:
            asked = time.monotonic()
            next(iter(client.generate(prompt, max_tokens=16)))
            first_served_s = time.monotonic() - asked
    seconds = {
        "generate --local: first token": first_s,
        "generate --local: 16 tokens": whole_s,
        "serve: ready": ready_s,
        "first token of the ready server": first_served_s,
    }
    return Journey(
        (f'ladderstitch generate "{prompt}" --local --model ./my-llama',),
        {name: round(value, 2) for name, value in seconds.items()},
        _megabytes([folder / "model.safetensors"]),
        {"output_bytes": len(answer)},
    )


def served_family(work: Path, advance: Callable[[str], None]) -> Journey:
    """Time two ONNX files and 200 images to a served family.

    The networks are EfficientNet-Lite 0 and 2, of the fetched bundle; the images are parts of
    scikit-image's photographs. Raises `BundleError` if the bundle was not fetched.
    """
    advance("writing networks and images")
    bundle = VisionBundle.load(find_bundle(FAMILY))
    files = export_networks(bundle, work)
    write_images(work / "photos", bundle.manifest.preprocessing)
    home = {HOME_VARIABLE: str(work / "home")}
    command = ("make", *(f.name for f in files), "--images", "photos", "--name", "mine")
    advance("make")
    started = time.monotonic()
    done = subprocess.run(
        [*LADDERSTITCH, *command],
        cwd=work,
        env=os.environ | home,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    made_s = time.monotonic() - started
    advance("serve")
    started = time.monotonic()
    with ladderstitch_server("--no-ray", "--model", str(work / "home" / "mine")) as server:
        ready_s = time.monotonic() - started
        with Client(server.address) as client:
            asked = time.monotonic()
            client.predict((work / "photos" / "000.jpg").read_bytes())
            answered_s = time.monotonic() - asked
            model = client.get_model()
    seconds = {"make": made_s, "serve: ready": ready_s, "first answer": answered_s}
    seconds["total"] = sum(seconds.values())
    return Journey(
        (f"ladderstitch {' '.join(command)}", "ladderstitch serve --model mine"),
        {name: round(value, 2) for name, value in seconds.items()},
        _megabytes(files),
        {"variants": len(model.variants), "on_frontier": len(model.frontier), "images": IMAGES},
    )


def write_llama(folder: Path) -> None:
    """Write a random Llama as transformers stores it, with one token per byte."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    random = torch.Generator().manual_seed(0)
    shapes = expected_shapes(read_architecture(LLAMA).config)
    tensors = {
        name: (
            torch.randn(shape, generator=random) * shape[-1] ** -0.5
            if len(shape) > 1
            else torch.ones(shape)
        ).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_byte_tokenizer(folder / "tokenizer.json")


def export_networks(bundle: VisionBundle, folder: Path) -> list[Path]:
    """Write a small and a large network as ONNX files, with their preprocessing next to them."""
    images = bundle.manifest.preprocessing
    shape = (images.channels, images.height, images.width)
    units = cached_units(bundle.digest(), bundle.load_stitched, shape, lambda done, total: None)
    in_float32 = [v for v in bundle.manifest.variants() if v.precision == "float32"]
    anchors = {v.front: v for v in in_float32 if v.is_anchor}
    settings = {
        "image_mean": images.mean,
        "image_std": images.std,
        "do_resize": True,
        "size": {"shortest_edge": round(images.height / (images.crop or 1.0))},
        "do_center_crop": True,
        "crop_size": {"height": images.height, "width": images.width},
        "resample": 3,
    }
    files = []
    for number in (SMALL, LARGE):
        file = folder / f"lite{number}.onnx"
        onnx.save(join_units(unit_paths(anchors[number], units, bundle.int8_folder)), file)
        settings_file = file.with_name(f"{file.stem}.preprocessor_config.json")
        settings_file.write_text(json.dumps(settings))
        files.append(file)
    return files


def write_images(folder: Path, preprocessing: Preprocessing) -> None:
    """Write 200 JPEG files: random parts of scikit-image's photographs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as packages:
        install_packages([PHOTOGRAPHS], Path(packages))
        found = find_photographs(Path(packages) / "skimage" / "data")
        sources = [p for p in found if not p.stem.lower().startswith(NOT_PHOTOGRAPHS)]
        for number in range(IMAGES):
            with Image.open(sources[number % len(sources)]) as image:
                side = int(rng.uniform(0.5, 1.0) * min(image.size))
                left = int(rng.integers(0, image.width - side + 1))
                upper = int(rng.integers(0, image.height - side + 1))
                part = image.convert("RGB").crop((left, upper, left + side, upper + side))
            part.save(folder / f"{number:03d}.jpg", quality=92)


def _time_output(command: Sequence[str]) -> tuple[float, float, bytes]:
    """Run a command; return the seconds to its first byte and to its end, and its output.

    Raises `RuntimeError` with its errors if it fails.
    """
    started = time.monotonic()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_s = time.monotonic() - started
        rest = process.stdout.read()
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read().decode()}")
    return first_s, time.monotonic() - started, first + rest


def _megabytes(files: Sequence[Path]) -> float:
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)
