"""A bare `grpc.aio` echo: the lower bound for any Python gRPC server.

`python -m ladderstitch_loadtest.benchmarks.echo` prints its port and serves until its input closes.
"""

from __future__ import annotations

import asyncio
import sys

import grpc

METHOD = "/ladderstitch.loadtest.Echo/Echo"


async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    """Return the request unchanged."""
    return request


async def serve() -> None:
    """Print the port on standard output and serve until standard input closes."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_unary_rpc_method_handler(echo)
    _, service, method = METHOD.split("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve())
