# /// script
# dependencies = ["pip"]
#
# [tool.ladderstitch]
# package = "perf-analyzer"
# limit_s = 500
# ///
"""NVIDIA's load generator: without options, unary, streams, ranges of load, a language model.

Its binary wants glibc 2.38. On older systems, LADDERSTITCH_GLIBC may name a folder with a newer
`ld-linux-x86-64.so.2`, `libc.so.6` and `libstdc++.so.6`, such as an unpacked package of Debian 13.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "2.60.0"
NEEDED = (2, 38)
LOADER = "ld-linux-x86-64.so.2"
IMAGES, TEXT = os.environ["LADDERSTITCH_IMAGE_MODEL"], os.environ["LADDERSTITCH_TEXT_MODEL"]
QUICK = ["--measurement-interval", "500", "--stability-percentage", "999", "--max-trials", "5"]
"""Short measurements: what matters here is that they end."""
UNSTABLE, UNSTABLE_STATUS = "Failed to obtain stable measurement.", 2
"""The end of a measurement, complete as such, on a machine that others use, too."""


def skip(reason: str) -> None:
    print(reason)
    sys.exit(77)


def loader() -> list[str]:
    """Return the command before the binary on a system whose glibc is too old."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        skip("its wheel is for Linux on x86-64 only")
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(map(int, version.split(".")[:2])) >= NEEDED:
        return []
    folder = Path(os.environ.get("LADDERSTITCH_GLIBC", ""))
    if not (folder / LOADER).is_file():
        skip(f"needs glibc 2.38, got {name} {version}; LADDERSTITCH_GLIBC may name a newer one")
    paths = f"{folder}:/usr/lib/x86_64-linux-gnu"
    return [str(folder / LOADER), "--library-path", paths]


def download(folder: Path) -> Path:
    """Return the binary of the wheel, which pip does not install on older systems."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    only = ["--only-binary", ":all:", "--platform", "manylinux_2_38_x86_64"]
    package = f"perf-analyzer=={VERSION}"
    subprocess.run([*pip, *only, "--dest", str(folder), package], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("perf_analyzer/bin/perf_analyzer", folder)
    binary = folder / "perf_analyzer/bin/perf_analyzer"
    binary.chmod(0o755)
    return binary


def main() -> None:
    before = loader()
    print(f"version {VERSION}")
    with tempfile.TemporaryDirectory() as folder:
        command = [*before, str(download(Path(folder)))]
        report = Path(folder) / "report.csv"

        def run(what: str, model: str, *options: str) -> None:
            address = ["-i", "grpc", "-u", os.environ["LADDERSTITCH_GRPC"]]
            done = subprocess.run(
                [*command, "-m", model, *address, *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            unstable = done.returncode == UNSTABLE_STATUS and UNSTABLE in done.stdout
            complete = done.returncode == 0 and "throughput:" in done.stdout
            assert complete or unstable, f"{what}: {done.stdout[-1500:]}"
            print(f"ok {what}{' (not stable on this machine)' if unstable else ''}", flush=True)

        run("no options", IMAGES)
        run("unary, batches of 4, CSV", IMAGES, *QUICK, "-b", "4", "-f", str(report))
        assert "Server Queue" in report.read_text()
        run("zeros", IMAGES, *QUICK, "--input-data", "zero")
        run("stream", IMAGES, *QUICK, "--streaming")
        run("range of concurrency", IMAGES, *QUICK, "--concurrency-range", "1:4:3")
        run("range of rates", IMAGES, *QUICK, "--request-rate-range", "20:60:40")
        run(
            "stream, range of rates",
            IMAGES,
            *QUICK,
            "--streaming",
            "--request-rate-range",
            "20:60:40",
        )
        text = ["--streaming", "--request-parameter", "max_tokens:8:int"]
        run("language model", TEXT, *QUICK, *text)
        run("language model, range", TEXT, *QUICK, *text, "--concurrency-range", "1:2")


if __name__ == "__main__":
    main()
