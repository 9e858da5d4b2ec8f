"""The chat template of a model: rendered in a process of its own, and checked when it is loaded."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError, nodes

from ladderstitch.errors import BundleError, EngineRestarting, InvalidArgument, Overloaded
from ladderstitch.runtime.process import is_stopped
from ladderstitch.text.control_tokens import find_control_tokens
from ladderstitch.text.template_worker import template_environment
from ladderstitch.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

Message = dict[str, Any]
"""One message of a conversation: `role`, `content` and what else its template reads."""

MAX_TEMPLATE_CHARACTERS = 1 << 20
RENDER_CPU_S = 1.0
"""Seconds of processor time in which a conversation is rendered."""
RENDER_WALL_S = 60.0
"""Seconds after which a process that renders is ended."""
STOPPED_S = 1.0
"""Seconds without an answer after which a process that is stopped is ended."""
MEMORY_BYTES = 256 << 20
"""Memory of a process that renders, in addition to what it starts with."""
MAX_WAITING = 64
"""Conversations that wait for the process; further ones are rejected."""

TRIALS: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
"""Roles of the conversations that a template is tried with when it is loaded."""


class Rejected(InvalidArgument):
    """The template does not support such conversations, and says so by `raise_exception`."""


class TooSlow(InvalidArgument):
    """A conversation took more processor time than `RENDER_CPU_S`."""


class ProcessEnded(Exception):
    """The process ended, or was ended, before it answered."""


class TemplateProcess:
    """A running process of `template_worker`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Start the process; raises `OSError` if the system cannot."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ladderstitch.text.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's signals are for the server
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            self._write(settings)
        except ProcessEnded:
            self.close()
            raise

    def request(self, variables: Mapping[str, Any]) -> dict[str, str]:
        """Return the answer to a request; raises `ProcessEnded` if there is none."""
        answered = threading.Event()
        threading.Thread(target=self._watch, args=(answered,), daemon=True).start()
        try:
            self._write(variables)
            assert self._process.stdout is not None, "a pipe"
            line = self._process.stdout.readline()
        finally:
            answered.set()
        if not line.endswith(b"\n"):
            raise ProcessEnded
        answer: dict[str, str] = json.loads(line)
        return answer

    def close(self) -> int:
        """End the process and return its exit status; closing it again changes nothing."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "a pipe"
            try:
                pipe.close()
            except BrokenPipeError:  # what was not written is for a process that has ended
                continue
        return self._process.wait()

    def _watch(self, answered: threading.Event) -> None:
        """End the process if it is stopped, or takes too long, before it has answered."""
        end = time.monotonic() + RENDER_WALL_S
        while not answered.wait(STOPPED_S):
            if is_stopped(self._process.pid) or time.monotonic() > end:
                self._process.kill()
                return

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None, "a pipe"
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise ProcessEnded from error


class ChatTemplate:
    """The template of one model and the process that renders it, one conversation at a time.

    Conversations wait in a thread, so that the event loop goes on. The process is started again
    when it has ended.
    """

    def __init__(
        self,
        template: str,
        tokenizer: TextTokenizer,
        special_tokens: Mapping[str, str],
        max_characters: int = 1 << 20,
    ) -> None:
        """`special_tokens` are variables of the template: `bos_token`, `eos_token`, ...

        Raises `BundleError` if the template is too long or is not valid.
        """
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise BundleError(
                f"chat_template: expected at most {MAX_TEMPLATE_CHARACTERS} characters, "
                f"got {len(template)}"
            )
        self.source = template
        self._tokenizer, self._special_tokens = tokenizer, dict(special_tokens)
        self._settings = {
            "template": template,
            "control_tokens": find_control_tokens(tokenizer.added_tokens, _literal_texts(template)),
            "max_characters": max_characters,
            "memory_bytes": MEMORY_BYTES,
            "cpu_s": RENDER_CPU_S,
        }
        self._process: TemplateProcess | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat-template")
        self._waiting = 0
        self._lock = threading.Lock()
        self._closed = False

    async def encode(
        self,
        messages: Sequence[Message],
        *,
        allow_control_tokens: bool = False,
        beginning: str = "",
        **variables: Any,
    ) -> list[int]:
        """Return the tokens after which the model writes the next message of a conversation.

        The message begins with `beginning`. `variables` are more variables of the template. Control
        tokens in all of them are plain text unless they are allowed. Raises
        `InvalidArgument` if the template rejects the messages, fails or takes too long, and
        `Overloaded` if too many conversations wait.
        """
        if self._waiting >= MAX_WAITING:
            raise Overloaded("too many conversations wait to be rendered", retry_after_s=1.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread,
                self._encode,
                list(messages),
                allow_control_tokens,
                variables,
                beginning,
            )
        finally:
            self._waiting -= 1

    def render(
        self, messages: Sequence[Message], *, mark_control_tokens: bool = False, **variables: Any
    ) -> str:
        """Return the text of a conversation; raises as `encode` does."""
        given = {"tools": None, "documents": None, "add_generation_prompt": True}
        values = {"messages": list(messages)} | given | self._special_tokens | variables
        marked = ["messages", *variables] if mark_control_tokens else []
        answer = self._request({"variables": values, "marked": marked})
        if "rejection" in answer:
            message = f"the model's chat template rejects them: {answer['rejection']}"
            raise Rejected("messages", message)
        if "error" in answer:
            raise InvalidArgument("messages", f"the model's chat template fails: {answer['error']}")
        return answer["text"]

    def check(self, num_rows: int) -> None:
        """Raise `BundleError` if the template fails for each of a few usual conversations.

        A template may reject all of them, as it may support other ones only. It also raises if the
        tokens of the first one that is rendered are not below `num_rows`, the number of tokens
        that the model knows.
        """
        problems, is_rejection = [], False
        for roles in TRIALS:
            messages = [{"role": role, "content": "Hello"} for role in roles]
            try:
                tokens = self._encode(messages, False, {})
            except TooSlow as error:
                raise BundleError(f"chat_template: {error}") from None
            except InvalidArgument as error:
                is_rejection |= isinstance(error, Rejected)
                problems.append(f"{', '.join(roles)}: {str(error).removeprefix('messages: ')}")
                continue
            if unknown := [token for token in tokens if token >= num_rows]:
                name, problem = self._tokenizer.token(unknown[0]), f"of which it has {num_rows}"
                raise BundleError(
                    f"chat_template: expected tokens of the model, {problem}, got {name!r}"
                )
            return
        listed = "; or of ".join(problems)
        if not is_rejection:
            raise BundleError(f"chat_template: expected it to render a conversation of {listed}")
        log.warning("the chat template renders no usual conversation, that is, of %s", listed)

    def close(self) -> None:
        """End the process; conversations that wait are cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def _encode(
        self,
        messages: list[Message],
        allow_control_tokens: bool,
        variables: dict[str, Any],
        beginning: str = "",
    ) -> list[int]:
        text = self.render(messages, mark_control_tokens=not allow_control_tokens, **variables)
        return self._tokenizer.encode_chat(text + beginning)

    def _request(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Return the answer of the process; a process that another one has ended is replaced."""
        for _ in range(2):
            process = self._running_process()
            try:
                return process.request(request)
            except ProcessEnded:
                if self._remove(process) == -signal.SIGPROF:
                    seconds = f"{RENDER_CPU_S:g} s of processor time"
                    message = f"expected the chat template to take at most {seconds}, it took more"
                    raise TooSlow("messages", message) from None
                log.warning("the process of a chat template ended before it answered")
        raise EngineRestarting("the process of the chat template ended twice")

    def _running_process(self) -> TemplateProcess:
        with self._lock:
            if self._closed:
                raise EngineRestarting("the model is being unloaded")
            if self._process is None:
                try:
                    self._process = TemplateProcess(self._settings)
                except (OSError, ProcessEnded) as error:
                    message = f"the process of the chat template cannot start: {error}"
                    raise EngineRestarting(message) from error
            return self._process

    def _remove(self, process: TemplateProcess) -> int:
        """Forget a process that has ended its output, and return its exit status."""
        with self._lock:
            if self._process is process:
                self._process = None
        return process.close()


def _literal_texts(template: str) -> str:
    """Return the texts that a template writes; raises `BundleError` if it is not valid."""
    try:
        tree = template_environment().parse(template)
    except (TemplateError, RecursionError) as error:
        raise BundleError(f"chat_template: {error}"[:500]) from error
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    constants = (node.value for node in tree.find_all(nodes.Const))
    return "\0".join([*texts, *(value for value in constants if isinstance(value, str))])
