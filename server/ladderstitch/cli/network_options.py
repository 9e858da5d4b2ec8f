"""Options that describe networks of the user, for `make` and `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ladderstitch.errors import ConfigError

Labels = Annotated[
    Path | None,
    typer.Option(help="Text file with one label per line (default: from config.json)."),
]
Mean = Annotated[
    str | None, typer.Option(help="Mean of each channel of pixels in [0, 1], e.g. 0.5,0.5,0.5.")
]
Std = Annotated[
    str | None, typer.Option(help="Standard deviation of each channel, in the form of `--mean`.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Side of the images in pixels, if the file leaves it open."),
]
Crop = Annotated[
    str | None,
    typer.Option(
        help="Side of the centred square that is kept, as a share of the shorter side, or "
        "`whole`: the image is stretched."
    ),
]
Resize = Annotated[str | None, typer.Option(help="Interpolation: bilinear or bicubic.")]
Outputs = Annotated[
    str,
    typer.Option(
        help="What the networks return: scores, tensors, or auto: one tensor [batch, K] is scores."
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        help="Shape of one input, e.g. 3,16,112,112, if it is no image and the file leaves it open."
    ),
]


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Return the sizes of an option, which commas separate, or None if it is not given.

    Raises `ConfigError` for anything else.
    """
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"shape: expected sizes such as 3,224,224, got {text}")
    return tuple(map(int, parts))


def build_info(
    name: str, licence: str, settings: Any, outputs: str, input_shape: str | None
) -> Any:
    """Return what the user states about a family; raises `ConfigError` for an unknown choice."""
    from ladderstitch.importers.network_outputs import OutputChoice
    from ladderstitch.importers.onnx_networks import FamilyInfo

    known: tuple[OutputChoice, ...] = get_args(OutputChoice)
    for choice in known:
        if choice == outputs:
            return FamilyInfo(name, licence, settings, choice, parse_shape(input_shape))
    raise ConfigError(f"outputs: expected one of {known}, got {outputs}")


def build_settings(
    labels: Path | None,
    mean: str | None,
    std: str | None,
    image_size: int | None,
    crop: str | None,
    resize: str | None,
) -> Any:
    """Return the settings of images that options state.

    Raises `ConfigError` for values that cannot be read.
    """
    from ladderstitch.importers.image_settings import RESAMPLING, WHOLE, ImageSettings

    if resize is not None and resize not in RESAMPLING:
        raise ConfigError(f"resize: expected bilinear or bicubic, got {resize}")
    share: float | str | None = crop
    if crop is not None and crop != WHOLE:
        share = (parse_numbers("crop", crop) or (0.0,))[0]
        if not 0 < share <= 1:
            raise ConfigError(f"crop: expected a share above 0 and up to 1, or {WHOLE}, got {crop}")
    if min(parse_numbers("std", std) or (1.0,)) <= 0:
        raise ConfigError(f"std: expected positive numbers, got {std}")
    try:
        listed = None if labels is None else tuple(labels.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"labels: {error}") from error
    return ImageSettings(
        size=None if image_size is None else (image_size, image_size),
        mean=parse_numbers("mean", mean),
        std=parse_numbers("std", std),
        crop=share,
        resize=None if resize is None else RESAMPLING[resize],
        labels=listed,
        source="options",
    )


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Return the numbers of an option, which commas separate, or None if it is not given.

    Raises `ConfigError` for anything else.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: expected numbers such as 0.5,0.5,0.5, got {text}") from None
