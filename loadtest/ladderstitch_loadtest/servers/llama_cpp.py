"""llama.cpp's server in a process of its own, from packages that only it imports.

`python llama_cpp.py MODEL THREADS STREAMS` prints its port and serves until its input closes.
"""

from __future__ import annotations

import socket
import sys

CONTEXT_TOKENS = 1024
"""Context of each stream."""


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
