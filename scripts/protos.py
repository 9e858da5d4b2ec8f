"""Generate the committed stubs from protos/, or compare them with protos/."""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS, STUBS = ROOT / "protos", ROOT / "server"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(into: Path) -> list[Path]:
    """Write the stubs of all protos into a directory and return them; proto path = Python path."""
    sources = sorted(PROTOS.rglob("*.proto"))
    plugins = Path(sys.executable).parent  # protoc searches the PATH for mypy-protobuf
    os.environ["PATH"] = f"{plugins}{os.pathsep}{os.environ['PATH']}"
    arguments = ["protoc", f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
    arguments += [f"--{kind}_out={into}" for kind in ("python", "grpc_python", "mypy")]
    arguments += [f"--mypy_grpc_out={into}"]
    if protoc.main(arguments + [str(source) for source in sources]):
        raise SystemExit("protoc failed")
    return sorted(p for p in into.rglob("*") if p.name.endswith(SUFFIXES))


def main() -> int:
    """Write the stubs; with `--check` return 1 if a stub is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    if not parser.parse_args().check:
        for stub in generate(STUBS):
            (stub.parent / "__init__.py").touch()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = {stub.relative_to(folder): stub for stub in generate(Path(folder))}
        committed = {p.relative_to(STUBS): p for p in STUBS.rglob("*") if p.name.endswith(SUFFIXES)}
        stale = sorted(
            str(name)
            for name in fresh.keys() | committed.keys()
            if name not in fresh
            or name not in committed
            or not filecmp.cmp(fresh[name], committed[name], shallow=False)
        )
    for name in stale:
        sys.stderr.write(f"stale stub: server/{name}; run `make protos`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
