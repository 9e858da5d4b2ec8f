"""Torch networks to export: a folder of transformers, a name of timm, or the user's own function.

transformers and timm are no dependencies of this package. They are imported when a network of
theirs is named.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ladderstitch.bundles.files import read_json
from ladderstitch.errors import ConfigError, shorten
from ladderstitch.importers.image_settings import read_settings

TIMM = "timm:"
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
MAX_REASON_BYTES = 500
"""Length of a library's own error message in ours; those of missing weights name them all."""
PREFERRED = ("logits", "image_embeds", "pooler_output", "last_hidden_state", "feature_maps")
"""Outputs of transformers, of which the first one that a network has is exported."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What the user states about a source.

    `shape` is that of one input without the batch. `checkpoint` and `pretrained` concern timm.
    """

    shape: tuple[int, ...] | None = None
    checkpoint: Path | None = None
    pretrained: bool = False


@dataclass(frozen=True, slots=True)
class TorchSource:
    """A network, the shape of one input without the batch, and its library's configuration.

    `files` has the content of the files to write next to the ONNX file by the end of their names.
    The first output in `preferred` is exported unless the user names others; all, if it is empty.
    A network that returns one tensor calls it `output`.
    """

    network: nn.Module
    shape: tuple[int, ...]
    files: Mapping[str, Mapping[str, Any]]
    preferred: tuple[str, ...] = ()
    output: str = "output"


def open_source(source: str, options: SourceOptions) -> TorchSource:
    """Return the network that a source names.

    Raises `ConfigError` for a source that cannot be read, and one whose library is not installed.
    """
    is_timm = source.startswith(TIMM)
    if not is_timm and (options.checkpoint is not None or options.pretrained):
        raise ConfigError(f"checkpoint, pretrained: expected a source timm:NAME, got {source}")
    if is_timm:
        return _open_timm(source.removeprefix(TIMM), options)
    if Path(source).is_dir():
        return _open_folder(Path(source), options)
    if FUNCTION.fullmatch(source):
        return _call_function(source, options)
    raise ConfigError(
        f"source: expected a folder of transformers, timm:NAME or module:function, got {source}"
    )


def _import(library: str) -> Any:
    """Return a library that is not a dependency of this package."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ConfigError(
            f"source: expected an environment with {library} ({error}); pip install {library}"
        ) from error
    except Exception as error:  # builds of libraries that do not fit may end in any way
        raise ConfigError(f"source: {library} cannot be imported: {error}") from error


def _reason(error: Exception) -> str:
    return shorten(str(error), MAX_REASON_BYTES)


def _open_folder(folder: Path, options: SourceOptions) -> TorchSource:
    """Return the network in a folder that `save_pretrained` of transformers wrote."""
    transformers = _import("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = _read_fields(folder / "config.json")
    kind = _find_class(transformers, config, folder)
    arguments = {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
    if "projection_dim" in config:  # of both networks, but not a field of that for images
        arguments["projection_dim"] = config["projection_dim"]
    try:
        network, loaded = kind.from_pretrained(folder, **arguments)
    except Exception as error:  # the errors of a library, which have no common class
        raise ConfigError(f"{folder}: transformers cannot open it: {_reason(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ConfigError(
            f"{folder}: expected all weights of {kind.__name__}, got no {missing[:5]}"
        )
    files = {"config.json": config}
    if (folder / "preprocessor_config.json").is_file():
        files["preprocessor_config.json"] = _read_fields(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        processor = _read_fields(folder / "processor_config.json").get("image_processor")
        if isinstance(processor, dict):
            files["preprocessor_config.json"] = processor
    shape = options.shape or _shape_of_images(folder, network.config.to_dict())
    return TorchSource(network, shape, files, PREFERRED)


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(read_json(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected fields, got {type(fields).__name__}")
    return fields


def _find_class(transformers: Any, config: Mapping[str, Any], folder: Path) -> Any:
    """Return the class of a network; of a network for images and texts, that of its images."""
    names: Any = config.get("architectures")
    given = names[0] if isinstance(names, list) and names else None
    if not isinstance(given, str) or not hasattr(transformers, given):
        raise ConfigError(f"{folder}: architectures: expected one of transformers, got {names}")
    name = given
    if "vision_config" in config:
        stem = name.removesuffix("Model") + "VisionModel"
        name = f"{stem}WithProjection" if hasattr(transformers, f"{stem}WithProjection") else stem
        if not hasattr(transformers, name):
            raise ConfigError(f"{folder}: expected a network of images alone, got {given}")
    return getattr(transformers, name)


def _shape_of_images(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return [C, H, W] by the image processor, or else by the configuration of the network."""
    own = config.get("vision_config") or config
    height, width = read_settings(folder / "model.onnx").size or _pair(own.get("image_size") or 224)
    return int(own.get("num_channels", 3)), height, width


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _open_timm(name: str, options: SourceOptions) -> TorchSource:
    """Return a network of timm, with as many classes as its checkpoint has."""
    if options.checkpoint is None and not options.pretrained:
        raise ConfigError(f"timm:{name}: expected --checkpoint FILE or --pretrained, got neither")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        raise ConfigError(f"checkpoint: expected a file, got {options.checkpoint}")
    timm = _import("timm")
    try:
        arguments = _timm_arguments(timm, name, options)
        network = timm.create_model(name, pretrained=options.pretrained, **arguments)
        if options.checkpoint is not None:
            timm.models.load_checkpoint(network, str(options.checkpoint), weights_only=True)
    except Exception as error:  # the errors of a library, which have no common class
        raise ConfigError(f"timm:{name}: timm cannot open it: {_reason(error)}") from error
    stated = dict(network.pretrained_cfg)
    shape = options.shape or tuple(stated["input_size"])
    stated["input_size"] = list(shape)
    for field in ("mean", "std"):
        values = stated[field]
        if len(values) != shape[0]:  # a network for images of one channel
            stated[field] = [sum(values) / len(values)] * shape[0]
    files = {"config.json": _timm_config(stated, network.num_classes)}
    output = "scores" if network.num_classes else "embedding"
    return TorchSource(network, shape, files, output=output)


def _timm_arguments(timm: Any, name: str, options: SourceOptions) -> dict[str, Any]:
    """Return the arguments that fit a network to its inputs and to the classes of its checkpoint.

    A checkpoint without a classifier gives a network without one, which returns embeddings.
    """
    arguments: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(name) if ":" not in name else None
    if options.shape is not None:
        arguments["in_chans"] = options.shape[0]
        if config is not None and config.fixed_input_size:
            arguments["img_size"] = options.shape[1:]
    head = config.classifier if config is not None else None
    head = head[0] if isinstance(head, tuple | list) else head
    if options.checkpoint is not None and head is not None:
        weights = timm.models.load_state_dict(str(options.checkpoint), weights_only=True)
        last = weights.get(f"{head}.weight")
        arguments["num_classes"] = 0 if last is None else len(last)
    return arguments


def _timm_config(stated: dict[str, Any], classes: int) -> dict[str, Any]:
    """Return the content of timm's `config.json`, with labels if they are those of the network."""
    names = stated.pop("label_names", None)
    fields: dict[str, Any] = {"pretrained_cfg": stated, "num_classes": classes}
    if names is not None and len(names) == classes:
        fields["label_names"] = list(names)
    return fields


def _call_function(source: str, options: SourceOptions) -> TorchSource:
    """Return the network that a function of the user returns, found from the current folder."""
    module, function = source.split(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        network = getattr(importlib.import_module(module), function)()
    except Exception as error:  # code of the user
        raise ConfigError(f"{source}: {type(error).__name__}: {_reason(error)}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{source}: expected a torch module, got {type(network).__name__}")
    if options.shape is None:
        raise ConfigError(f"shape: expected that of one input of {source}, such as 3,224,224")
    return TorchSource(network, options.shape, {})
