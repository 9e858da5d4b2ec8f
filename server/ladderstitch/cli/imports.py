"""The command `import`: a bundle from checkpoints, ONNX files or a folder of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladderstitch.cli.bundle_records import print_bundle
from ladderstitch.cli.console import Json, err, out, user_errors
from ladderstitch.cli.import_networks import import_networks
from ladderstitch.cli.language_families import NETWORK_SUFFIXES
from ladderstitch.cli.network_options import InputShape, Outputs, parse_numbers
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    from ladderstitch.importers.import_bundle import BundleInfo
    from ladderstitch.vision.models.nested.model import NestedModel
    from ladderstitch.vision.models.stitched import StitchedModel

SUPERNETS = (
    "ofa-resnet",
    "ofa-mbv3",
    "autoformer",
    "thinkingvit",
    "vit-resnas",
    "attentivenas",
)


Checkpoints = Annotated[
    list[Path],
    typer.Argument(
        help="File of a stitched family, or files of plain networks, smallest first "
        "(.safetensors, .pth)."
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        help="Kind of the stitched family: snnet-deit, snnet-swin, snnet-resnet, "
        "snnet-resnet-swin, snnet-levit, snnetv2 or learngene-pool; or of the supernet: "
        "ofa-resnet, ofa-mbv3, autoformer, thinkingvit, vit-resnas or attentivenas; or "
        "matformer-olmo, whose "
        "checkpoint is a folder."
    ),
]
FamilyConfig = Annotated[
    Path | None,
    typer.Option(help="Sizes of the family, JSON or YAML (default: the published ones)."),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Mean of each channel, subtracted from pixels in [0, 1], e.g. 0.5,0.5,0.5 "
        "(default: ImageNet's; 0.5 for grey images)."
    ),
]
Std = Annotated[
    str | None,
    typer.Option(help="Standard deviation of each channel, in the form of `--mean`."),
]


def import_(
    checkpoints: Checkpoints,
    into: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    family: Family = None,
    config: FamilyConfig = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of photographs, on which plain networks are stitched."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side of the images in pixels, if the file does not contain it."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the model in requests.")] = "imported",
    labels: Annotated[Path | None, typer.Option(help="Text file with one label per line.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "not stated",
    mean: Mean = None,
    std: Std = None,
    outputs: Outputs = "auto",
    input_shape: InputShape = None,
    paths: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Supernets: networks to list, the smallest, the largest and random ones "
            "(default: 60); `frontier --prune` keeps the best of them.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Supernets: seed of the random ones.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a bundle from checkpoints or ONNX files.

    The input, published or your own, is one file of a stitched family or of a supernet, or files of
    DeiT, ViT, Swin or ResNet networks in the layout of timm or Hugging Face, which become the
    anchors of a new family, or ONNX files or a `family.yaml` that lists them, among which budgets
    choose (`make` stitches them). Only weights are read: no code in a file is run. The error lists
    tensors that do not fit.
    """
    from ladderstitch.importers.import_bundle import BundleInfo

    with user_errors():
        if family is None and all(path.suffix in NETWORK_SUFFIXES for path in checkpoints):
            done = import_networks(
                checkpoints,
                into,
                name=name,
                licence=licence,
                labels=labels,
                mean=mean,
                std=std,
                image_size=image_size,
                outputs=outputs,
                input_shape=input_shape,
            )
        elif family == "matformer-olmo":
            done = _import_olmo(checkpoints, into, name, licence)
        else:
            means, stds = parse_numbers("mean", mean), parse_numbers("std", std)
            info = BundleInfo(name, licence, labels, means, stds)
            model = _import_checkpoints(
                checkpoints, into, family, config, info, images, image_size, paths, seed
            )
            count = sum(stitch.usable for stitch in model.stitches)
            done = f"{count} networks; next: ladderstitch calibrate {into} --data FOLDER"
    if as_json:
        print_bundle(into)
    (err if as_json else out).print(f"{into}: {done}", soft_wrap=True)


def _import_checkpoints(
    checkpoints: list[Path],
    into: Path,
    family: str | None,
    config: Path | None,
    info: BundleInfo,
    images: Path | None,
    image_size: int | None,
    paths: int | None,
    seed: int,
) -> StitchedModel | NestedModel:
    """Write the bundle of checkpoints of image networks, and return the model."""
    from ladderstitch.importers.import_bundle import import_anchors, import_released

    if folders := [path for path in checkpoints if path.is_dir()]:
        raise ConfigError(
            f"checkpoints: expected files, got the folder {folders[0]}; a language model of "
            f"transformers needs no import: ladderstitch serve --model {folders[0]}; several "
            "of one tokenizer are stitched by `make`"
        )
    if family is None:
        return import_anchors(checkpoints, images, info, into, image_size=image_size)
    if len(checkpoints) != 1:
        raise ConfigError(f"checkpoints: expected one file for {family}, got {len(checkpoints)}")
    if family not in SUPERNETS:
        return import_released(family, checkpoints[0], config, info, into)
    from ladderstitch.importers.import_nested import import_supernet

    return import_supernet(family, checkpoints[0], config, info, into, paths=paths, seed=seed)


def _import_olmo(checkpoints: list[Path], into: Path, name: str, licence: str) -> str:
    """Write the bundle of a folder of MatFormer-OLMo; return how to measure its paths."""
    from ladderstitch.importers.import_olmo import import_olmo

    if len(checkpoints) != 1 or not checkpoints[0].is_dir():
        got = ", ".join(map(str, checkpoints))
        raise ConfigError(f"checkpoints: expected one folder for matformer-olmo, got {got}")
    bundle = import_olmo(checkpoints[0], into, name, licence)
    count = len(bundle.manifest.variants)
    return f"{count} paths; next: ladderstitch calibrate {into} --text FILE"
