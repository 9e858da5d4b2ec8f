"""Bundles from checkpoints of MatFormer-OLMo: one set of weights, a path per trained width.

The folder of a checkpoint has `config.yaml`, whose section `model` has the sizes, and the weights
(`model.pt` or `model.safetensors`) in upstream's names. The tokenizer is not part of it:
`tokenizer.json` is a copy of the one that the section `tokenizer` names.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ladderstitch.bundles.files import read_yaml
from ladderstitch.errors import ConfigError, DataError
from ladderstitch.importers.checkpoints import read_weights
from ladderstitch.importers.olmo import read_olmo
from ladderstitch.text.bundle import TextBundle, write_tokenizer
from ladderstitch.text.hugging_face.architectures import Architecture
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.layout import LaidOutWeights
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weight_reader import SINGLE, MemoryWeights
from ladderstitch.text.model.weights import check_weights
from ladderstitch.text.tokenizer_files import TOKENIZER

CONFIG = "config.yaml"
WEIGHTS = (SINGLE, "model.pt")
END_TOKEN = "eos_token_id"


def import_olmo(folder: Path, into: Path, name: str, licence: str) -> TextBundle:
    """Write the bundle of a checkpoint's folder, with one path per width of the MLPs.

    Raises `ConfigError`, `DataError` or `BundleError` naming the file and what does not fit. The
    qualities of the paths are to be measured (`calibrate`).
    """
    fields = read_yaml(folder / CONFIG)
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict):
        raise ConfigError(f"{folder / CONFIG}: model: expected the sizes of the model, got none")
    architecture = read_olmo(model)
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise DataError(f"{folder}: expected {' or '.join(WEIGHTS)}, found neither")
    if not (folder / TOKENIZER).exists():
        raise DataError(
            f"{folder / TOKENIZER}: missing; copy the tokenizer that {CONFIG} names to this place"
        )
    tensors = {name: tensor.contiguous() for name, tensor in read_weights(file).items()}
    laid_out = LaidOutWeights(MemoryWeights(tensors), architecture.layout, architecture.config)
    check_weights(laid_out, architecture.config)
    manifest = _manifest(architecture, model.get(END_TOKEN), folder, name, licence)
    write_manifest(into, manifest)
    save_file(tensors, into / SINGLE)
    write_tokenizer(into, folder / TOKENIZER, manifest)
    return TextBundle.load(into, calibrated=False)


def _manifest(
    architecture: Architecture, end: object, folder: Path, name: str, licence: str
) -> TextManifest:
    config = architecture.config
    widths = (config.intermediate_size, *reversed(config.nested_ffn))
    paths = tuple(
        TextVariant(
            name=f"ffn-{width}",
            residual=ResidualScheme(),
            ffn_widths=() if width == config.intermediate_size else (width,),
        )
        for width in widths
    )
    return TextManifest(
        name=name,
        config=config,
        layout=architecture.layout,
        paths=paths,
        end_tokens=(end,) if isinstance(end, int) else (),
        origin=f"MatFormer-OLMo, folder {folder.resolve().name}",
        licence=licence,
    )
