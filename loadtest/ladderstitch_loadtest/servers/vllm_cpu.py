"""vLLM's OpenAI server on CPUs, in an environment that has it.

`python vllm_cpu.py FOLDER THREADS STREAMS DTYPE` prints its port when it is ready and serves until
its input closes. The name of the served model is that of the folder.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

MODULE = "vllm.entrypoints.openai.api_server"
"""The server; the command `vllm serve` ends with an error where the package is `vllm-cpu`."""
CONTEXT_TOKENS = 1024
"""Context of each stream."""
KV_CACHE_GB = "1"
READY_TIMEOUT_S = 600.0
"""Limit of the start, in which vLLM compiles the model; later starts use the compiled one."""
STOP_TIMEOUT_S = 30.0
POLL_S = 0.5


def format_command(folder: Path, streams: str, dtype: str, port: int) -> list[str]:
    """Return vLLM's command line, which runs in the parent of the model's folder.

    vLLM finds a compiled model by its path, and the parent is another one at each start. Prompts
    are not cached, so that each is computed.
    """
    return [
        *(sys.executable, "-I", "-m", MODULE),
        f"--model={folder.name}",
        f"--served-model-name={folder.name}",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--dtype={dtype}",
        f"--max-model-len={CONTEXT_TOKENS}",
        f"--max-num-seqs={streams}",
        "--no-enable-prefix-caching",
    ]


def make_environment(
    threads: str, prefix: Path, inherited: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return vLLM's environment: its threads, and all of its caches inside of `prefix`.

    vLLM's documentation recommends to preload Intel's OpenMP, which its package brings.
    """
    openmp = prefix / "lib" / "libiomp5.so"
    preloaded = {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
    return {
        **inherited,
        **preloaded,
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": KV_CACHE_GB,
        "VLLM_CACHE_ROOT": str(prefix / "cache" / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(prefix / "cache" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def main() -> None:
    """Serve the model in the arguments."""
    folder, threads, streams, dtype = Path(sys.argv[1]), *sys.argv[2:5]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        format_command(folder, streams, dtype, port),
        cwd=folder.parent,
        env=make_environment(threads, Path(sys.prefix)),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
    )
    try:
        _wait_until_ready(process, port)
        sys.stdout.write(f"{port}\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server answers; exit with 1 if it ends or the time limit passes."""
    end = time.monotonic() + READY_TIMEOUT_S
    while True:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        if process.poll() is not None:
            sys.exit(1)  # the log ends with vLLM's own error
        if time.monotonic() > end:
            sys.exit(f"vLLM was not ready within {READY_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server, and kill what is left of its processes."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
