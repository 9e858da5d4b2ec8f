"""Build hook: makes the package `ladderstitch_client` from the sources of the server's package.

The two packages share no file, so both can be installed, in any order. The names of modules in
import statements are the only change. A source distribution holds the result.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OWN, NAME = Path(__file__).resolve().parent, "ladderstitch_client"
REPOSITORY = OWN.parents[1]
SOURCES = (
    "py.typed",
    "addresses.py",
    "errors.py",
    "client/*.py",
    "v1/*.py*",
    "scheduling/__init__.py",
    "scheduling/settings.py",
    *(
        f"cli/{module}.py"
        for module in (
            *("__init__", "app", "console", "options", "output"),
            *("admin", "generate", "models", "predict", "sampling", "schedule", "tensors"),
        )
    ),
)
"""Files of the server's package, below it, that the client has, too."""
IMPORT = re.compile(r"^(\s*(?:from|import) )ladderstitch\b", re.MULTILINE)
ROOT = '''"""The client of a ladderstitch server: `Client`, and `AsyncClient` for asyncio.

with Client("127.0.0.1:8001") as client:
    prediction = client.predict(png_bytes, budget_s=0.005)
"""

from ladderstitch_client.client import *  # noqa: F403
from ladderstitch_client.client import __all__ as __all__

__version__ = "{version}"


def run_command_line() -> None:
    """Run the command `ladderstitch-client`; without the extra `cli`, say what it needs."""
    try:
        from ladderstitch_client.cli import app
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"ladderstitch-client: no module {{error.name}}; the command needs the extra `cli`: "
            "pip install 'ladderstitch-client[cli]'"
        ) from None
    app(prog_name="ladderstitch-client")
'''


def write_package(folder: Path, version: str) -> None:
    """Write the package into a folder, with the protocol's files below `protos`."""
    server = REPOSITORY / "server" / "ladderstitch"
    for pattern in SOURCES:
        found = sorted(server.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{server}: expected {pattern}, got none")
        for source in found:
            target = folder / source.relative_to(server)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(IMPORT.sub(rf"\1{NAME}", source.read_text()))
    (folder / "__init__.py").write_text(ROOT.format(version=version))
    protos = REPOSITORY / "protos" / "ladderstitch"
    shutil.copytree(protos, folder / "protos" / "ladderstitch")


class PackageHook(BuildHookInterface[Any]):
    """Adds the package to a wheel or a source distribution."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the package, or take that of a source distribution."""
        if (OWN / NAME).is_dir():
            build_data["force_include"][str(OWN / NAME)] = NAME
            return
        self._made = tempfile.TemporaryDirectory()
        folder = Path(self._made.name) / NAME
        write_package(folder, str(self.metadata.version))
        build_data["force_include"][str(folder)] = NAME

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        if hasattr(self, "_made"):
            self._made.cleanup()
