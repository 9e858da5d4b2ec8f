"""llama.cpp's server in a process of its own, from packages that only it imports.

`python llama_cpp.py MODEL THREADS STREAMS` prints its port and serves until its input closes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTEXT_TOKENS = 1024
"""Context of each stream."""
STOP_TIMEOUT_S = 30.0


@contextmanager
def llama_cpp_server(packages: Path, model: Path, threads: int, streams: int) -> Iterator[str]:
    """Run llama.cpp's server on a GGUF file during the `with` block; yield its HTTP address.

    It computes on `threads` threads, and up to `streams` answers at a time.
    """
    command = [sys.executable, "-P", __file__, str(model), str(threads), str(streams)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(packages)},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(timeout=STOP_TIMEOUT_S)
        process.stdout.close()


def main() -> None:
    """Serve the model in the arguments."""
    import xllamacpp  # type: ignore[import-not-found] # only in the peer's packages

    model, threads, streams = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = streams
    params.n_ctx = CONTEXT_TOKENS * streams
    params.hostnames, params.port = ["127.0.0.1"], port
    params.cache_prompt = False
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
