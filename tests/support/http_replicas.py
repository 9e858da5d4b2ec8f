"""Scripted replicas with an HTTP port, and a caller of the gateway in front of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from tests.support.fake_replicas import FakeReplica, RunningGateway

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpReplica(FakeReplica):
    """A replica with an HTTP port, whose requests `respond` answers; `seen` lists them."""

    def __init__(self, name: str, models: tuple[str, ...] = ("tiny",)) -> None:
        super().__init__(name, models)
        self.respond: Answer = self.name_itself
        self.seen: list[web.Request] = []
        self._runner = web.AppRunner(
            self._application(), handler_cancellation=True, shutdown_timeout=0
        )

    def _application(self) -> web.Application:
        async def handle(request: web.Request) -> web.StreamResponse:
            await request.read()
            self.seen.append(request)
            return await self.respond(request)

        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handle)
        return application

    async def name_itself(self, request: web.Request) -> web.StreamResponse:
        body = {"replica": self.name, "body": (await request.read()).decode()}
        return web.json_response(body, headers={"x-own": self.name})

    async def start(self, port: int = 0) -> HttpReplica:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.state.http_port = self._runner.addresses[0][1]
        await super().start(port)
        return self

    async def stop(self) -> None:
        await super().stop()
        await self._runner.cleanup()


@asynccontextmanager
async def calling(running: RunningGateway, **headers: str) -> AsyncIterator[aiohttp.ClientSession]:
    assert running.gateway.http is not None
    base = f"http://127.0.0.1:{running.gateway.http.port}"
    async with aiohttp.ClientSession(base, headers=headers) as session:
        yield session
