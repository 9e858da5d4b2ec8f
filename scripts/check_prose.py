"""Check the English of code, comments, documentation and protos against a list of banned words.

Each entry has a plain replacement; docs/glossary.md lists the terms to use. Exits with 1 and one
line per finding: FILE:LINE: word (instead: ...).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BANNED = {
    r"anew": "again",
    r"mend(s|ed|ing|able)?": "fix, recover",
    r"whoever": "the caller, the process that",
    r"newcomers?": "new request",
    r"somebody|nobody": "name the actor",
    r"tells?|telling|told": "report, say",
    r"so long|so many|so much": "give the number and its unit",
    r"lets? go": "release, disconnect",
    r"in force": "active",
    r"the say": "control",
    r"beside": "next to, compared with",
    r"likewise": "name the subject again",
    r"reckon(s|ed|ing)?": "estimate, assume",
    r"be one": "run as",
    r"what came of it": "the result",
    r"is there": "exists",
    r"wishes": "options",
    r"of late": "recently",
    r"at present": "now, currently",
    r"the more": "say how much",
    r"by what": "name it",
}
PATTERN = re.compile("|".join(rf"\b(?:{word})\b" for word in BANNED), re.IGNORECASE)
SUFFIXES = {".py", ".md", ".proto", ".yaml", ".yml", ".toml", ".sh", ".tpl", ".txt"}
NAMES = {"Makefile", "Dockerfile"}
SKIPPED = ("tests/golden/", "loadtest/results/", "kernels/results/", "scripts/check_prose.py")
MAX_LINE = 100


def files() -> Iterator[Path]:
    """Yield the tracked files that people read."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        path = Path(name)
        generated = "_pb2" in path.name or name.startswith(SKIPPED)
        read = path.suffix in SUFFIXES or path.name in NAMES
        if read and not generated and (ROOT / path).is_file():
            yield path


def findings(path: Path) -> Iterator[str]:
    """Yield a line for each banned word, and for each overlong line of documentation."""
    for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
        for match in PATTERN.finditer(line):
            word = match[0]
            plain = next(p for w, p in BANNED.items() if re.fullmatch(w, word, re.IGNORECASE))
            yield f"{path}:{number}: {word} (instead: {plain})"
        if path.suffix == ".md" and len(line) > MAX_LINE and "|" not in line and "](" not in line:
            yield f"{path}:{number}: {len(line)} characters (at most {MAX_LINE})"


def main() -> int:
    """Print the findings; optional arguments restrict them to paths that start so."""
    chosen = tuple(sys.argv[1:])
    found = [
        text
        for path in files()
        if not chosen or str(path).startswith(chosen)
        for text in findings(path)
    ]
    sys.stdout.write("".join(f"{text}\n" for text in found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
