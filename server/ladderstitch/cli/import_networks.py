"""Import of independent ONNX networks, for the command `import`."""

from __future__ import annotations

from pathlib import Path

from ladderstitch.cli.network_options import build_info, build_settings


def import_networks(
    files: list[Path],
    into: Path,
    *,
    name: str,
    licence: str,
    labels: Path | None,
    mean: str | None,
    std: str | None,
    image_size: int | None,
    outputs: str,
    input_shape: str | None,
) -> str:
    """Write the bundle of independent ONNX networks; return their number and what to do next."""
    from ladderstitch.importers.onnx_bundle import import_networks as run

    settings = build_settings(labels, mean, std, image_size, None, None)
    bundle = run(files, build_info(name, licence, settings, outputs, input_shape), into)
    count = len(bundle.manifest.variants())
    known = f" of {bundle.quality.metric} quality" if bundle.quality is not None else ""
    given = "--images" if bundle.manifest.outputs else "--data"
    step = f"serve --model {into}" if known else f"calibrate {into} {given} FOLDER"
    return f"{count} networks{known}; next: ladderstitch {step}"
