"""The forward passes of a group, one after another, and the wait for their replies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ladderstitch.errors import InternalError
from ladderstitch.text.engine.liveness import wait_until_done
from ladderstitch.text.engine.members import Members
from ladderstitch.text.engine.rank_handle import RankLost, raise_pass_error, request_all
from ladderstitch.text.messages import Message

log = logging.getLogger(__name__)


class Passes:
    """The passes that the members of a group run; `lock` is held while one runs.

    `slow` is set while a reply is much later than planned.
    """

    def __init__(
        self,
        members: Members,
        on_loss: Callable[[], None],
        on_failure: Callable[[], Awaitable[None]],
    ) -> None:
        """`on_loss` is called when a rank is lost or late, `on_failure` after a failed pass."""
        self._members, self._on_loss, self._on_failure = members, on_loss, on_failure
        self.lock = asyncio.Lock()
        self.slow = False

    async def run(
        self, message: Message, planned_s: float | None, is_ready: Callable[[], bool]
    ) -> list[Message]:
        """Send a message to all ranks once no pass runs, and return their replies.

        Raises `RankLost` if a rank died or `is_ready` is false then, and `InternalError` if the
        pass failed on a rank. A cancelled caller does not interrupt the pass.
        """
        await self.lock.acquire()
        try:
            if not is_ready():
                raise RankLost("the group is recovering")
            # The ranks start before other tasks of this process run, such as writing tokens.
            replies = request_all(self._members.live(), message)
        except BaseException:
            self.lock.release()
            raise
        running = asyncio.create_task(self._finish(replies, planned_s))
        running.add_done_callback(_retrieve_exception)
        return await asyncio.shield(running)  # the ranks' replies must be read in any case

    async def _finish(
        self, replies: Awaitable[list[Message | BaseException]], planned_s: float | None
    ) -> list[Message]:
        """Return the ranks' replies; report if one of them does not reply or is lost.

        After a pass that failed on a rank, the ranks are at different reductions. They get a new
        communicator before the next pass, which must not read partials of this one.
        """
        try:
            answered = await self._await_replies(asyncio.ensure_future(replies), planned_s)
            return raise_pass_error(answered)
        except RankLost:
            self._on_loss()
            raise
        except InternalError:
            if self._members.rank_config.ranks > 1:
                await self._on_failure()
            raise
        finally:
            self.lock.release()

    async def _await_replies(
        self, replies: asyncio.Future[list[Message | BaseException]], planned_s: float | None
    ) -> list[Message | BaseException]:
        liveness, device = self._members.options.liveness, self._members.rank_config.device
        limit_s = liveness.limit_s(planned_s, device)
        slow_after_s = liveness.slow_after_s(planned_s, device)
        try:
            if not await wait_until_done(replies, slow_after_s, limit_s, self._report_slow):
                log.error(
                    "no reply of all ranks within limit_s=%.1f; replacing the others", limit_s
                )
                self._on_loss()  # which ends the ranks that do not abort the pass
            return await replies
        finally:
            self.slow = False

    def _report_slow(self) -> None:
        self.slow = True


def _retrieve_exception(done: asyncio.Task[list[Message]]) -> None:
    """Read the exception, so that asyncio does not log it when the caller has disconnected."""
    if not done.cancelled():
        done.exception()
