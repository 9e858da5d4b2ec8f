"""Export a torch network to ONNX, and compare the file with the network.

The exporter that traces is used (`dynamo=False`), which needs no other package. It writes down what
the network does for one input. The comparison therefore uses other batch sizes and other inputs.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.torch_sources import SourceOptions, TorchSource, open_source
from ladderstitch.runtime.sessions import ERRORS_ONLY

INPUT = "pixels"
OPSET = 17
TRACED_BATCH = 2
"""Batch size of the traced input; 1 would be taken for a constant."""
COMPARED_BATCHES = (1, 3)
TOLERANCE = 1e-4
"""Largest difference between file and network, relative to the largest output."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The files that were written, inputs and outputs, and the difference to the network.

    Shapes are without the batch. `difference` is relative to the largest output.
    """

    files: tuple[Path, ...]
    shape: tuple[int, ...]
    outputs: dict[str, tuple[int, ...]]
    difference: float


def export_network(
    source: str, output: Path, options: SourceOptions, chosen: Sequence[str] = ()
) -> ExportReport:
    """Write the ONNX file of a torch network, with preprocessing and labels next to it.

    `chosen` names the outputs to export of a network that returns several by name. Nothing is
    written unless the outputs of the file equal those of the network. Raises `ConfigError` for a
    source that cannot be read or exported, and `BundleError` for a difference.
    """
    if output.suffix != ".onnx":
        raise ConfigError(f"output: expected a file that ends in .onnx, got {output}")
    found = open_source(source, options)
    network = Flat(found, chosen)
    with torch.no_grad(), _quietly():
        shapes = _run_once(network, found.shape, source)
        content = _trace(network, found.shape, list(shapes), source)
        difference = _compare(network, content, found.shape, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(content)
    return ExportReport((output, *_write_files(found, output)), found.shape, shapes, difference)


class Flat(nn.Module):
    """A network that returns a tuple of tensors; `names` are theirs after the first call."""

    def __init__(self, found: TorchSource, chosen: Sequence[str]) -> None:
        super().__init__()
        self.network = found.network.float()
        self.preferred, self.chosen, self.output = found.preferred, chosen, found.output
        self.names: list[str] = []
        self.eval()  # the exporter restores the state of the outermost module

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the chosen outputs; a list among them becomes several outputs.

        Raises `ConfigError` for outputs that the network does not have, or that are no tensors.
        """
        returned = self.network(pixels)
        if isinstance(returned, tuple | list):
            returned = {f"output_{number}": value for number, value in enumerate(returned)}
        named = dict(returned) if isinstance(returned, Mapping) else {self.output: returned}
        first = [name for name in self.preferred if name in named][:1]
        chosen = self.chosen or first or list(named)
        if not set(chosen) <= set(named):
            raise ConfigError(f"outputs: expected some of {list(named)}, got {list(chosen)}")
        tensors: dict[str, Any] = {}
        for name in chosen:
            value = named[name]
            if isinstance(value, tuple | list):
                tensors |= {f"{name}_{number}": item for number, item in enumerate(value)}
            else:
                tensors[name] = value
        others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if others or not tensors:
            raise ConfigError(f"outputs: expected tensors from the network, got others: {others}")
        self.names = list(tensors)
        return tuple(tensors.values())


def _run_once(network: Flat, shape: Sequence[int], source: str) -> dict[str, tuple[int, ...]]:
    """Return the outputs by name, with their shapes without the batch."""
    try:
        tensors = network(torch.zeros(TRACED_BATCH, *shape))
    except ConfigError:
        raise
    except Exception as error:  # code of the user or of a library
        wanted = f"inputs [batch, {', '.join(map(str, shape))}]"
        raise ConfigError(f"{source}: does not run on {wanted}: {error}") from error
    single = [t.shape for t in tensors if not t.ndim or t.shape[0] != TRACED_BATCH]
    if single:
        raise ConfigError(f"{source}: expected outputs [batch, ...], got {list(single[0])}")
    return {name: tuple(t.shape[1:]) for name, t in zip(network.names, tensors, strict=True)}


def _trace(network: Flat, shape: Sequence[int], names: list[str], source: str) -> bytes:
    """Return the content of the ONNX file, for batches of any size."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        try:
            torch.onnx.export(
                network,
                (torch.zeros(TRACED_BATCH, *shape),),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=names,
                dynamic_axes={name: {0: "batch"} for name in (INPUT, *names)},
            )
        except Exception as error:  # the exporter's errors have no common class
            raise ConfigError(f"{source}: torch cannot export it: {error}") from error
        return file.read_bytes()


def _compare(network: Flat, content: bytes, shape: Sequence[int], source: str) -> float:
    """Return the largest difference on random inputs, relative to the largest output.

    Raises `BundleError` if it is larger than `TOLERANCE`.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY + 1
    rng = np.random.default_rng(0)
    largest = 0.0
    for batch in COMPARED_BATCHES:
        inputs = rng.normal(size=(batch, *shape)).astype(np.float32)
        expected = [tensor.numpy() for tensor in network(torch.from_numpy(inputs))]
        try:
            session = onnxruntime.InferenceSession(content, settings)
            got = session.run(None, {INPUT: inputs})
        except Exception as error:  # the errors of ONNX Runtime have no common class
            raise BundleError(
                f"{source}: the exported file does not run on a batch of {batch}: {error}"
            ) from error
        for name, left, right in zip(network.names, got, expected, strict=True):
            if left.shape != right.shape or len(right) != batch:
                raise BundleError(
                    f"{source}: output {name}: expected [{batch}, ...] for a batch of {batch}, got "
                    f"{list(left.shape)} from the file and {list(right.shape)} from the network"
                )
            difference = _relative(left, right)
            if not difference <= TOLERANCE:
                raise BundleError(
                    f"{source}: output {name}: expected a difference of at most {TOLERANCE} "
                    f"between the file and the network on a batch of {batch}, got {difference:.1e}"
                )
            largest = max(largest, difference)
    return largest


def _relative(got: Any, expected: Any) -> float:
    """Return the largest difference of two arrays, relative to the largest value."""
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(got.astype(np.float64) - expected).max(initial=0.0)) / scale


def _write_files(found: TorchSource, output: Path) -> Iterator[Path]:
    """Write the configuration of the network's library next to its file."""
    for name, fields in found.files.items():
        path = output.with_name(f"{output.stem}.{name}")
        path.write_text(json.dumps(fields, indent=1, default=_as_json) + "\n")
        yield path


def _as_json(value: Any) -> Any:
    """Return a value that JSON does not have, such as a size or a type of torch, as text."""
    return list(value) if isinstance(value, tuple | set) else str(value)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the exporter's warnings: the comparison finds what they warn of."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
