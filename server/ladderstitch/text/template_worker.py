"""The process that renders a chat template as transformers does, within limits of time and memory.

A template is a program of the checkpoint's author, and what it does depends on the callers' texts.
The process reads one JSON object a line and answers each with one: the first has the template and
the limits, the others have variables. Its kernel ends it when a render takes too long.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Never

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ladderstitch.text.control_tokens import END, START, ControlTokens

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold its reasoning; templates read the first one."""


class GenerationTag(Extension):
    """The tag `{% generation %}`, which surrounds the model's own texts; its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body of the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return caller()


class TemplateDict:
    """The function `dict` of templates, without the type's attributes."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        """Return a dictionary as `dict` does."""
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return a dictionary as `dict.fromkeys` does."""
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """The function `namespace` of templates; names that begin with `_` are rejected."""

    def __init__(*args: Any, **fields: Any) -> None:  # a field may be `self`
        self, values = args[0], dict(*args[1:], **fields)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace: expected names without a leading _, got {name!r:.60}")


class Rejection(TemplateError):
    """An error that a template raises for messages that it does not support."""


def _reject(message: object) -> Never:
    raise Rejection(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as in transformers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON; Jinja's own filter would escape characters of HTML."""
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if ensure_ascii:  # marks of control tokens stay marks
        for mark in (START, END):
            text = text.replace(json.dumps(mark).strip('"'), mark)
    return text


def template_environment() -> Environment:
    """Return the environment that transformers' `apply_chat_template` renders templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _reject,
        "strftime_now": _strftime_now,
        "dict": TemplateDict(),
        "namespace": TemplateNamespace,
    }
    return environment


def _with_reasoning(message: Any) -> Any:
    """Return a message with its reasoning under each of the names that templates read."""
    if not isinstance(message, dict):
        return message
    given = (message[name] for name in REASONING_FIELDS if message.get(name) is not None)
    reasoning = next(given, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class Renderer:
    """The renderer of one template, which is compiled for the first request."""

    def __init__(self, template: str, max_characters: int, control_tokens: list[str]) -> None:
        self._source, self._max_characters = template, max_characters
        self._control_tokens = ControlTokens(control_tokens)
        self._template: Any = None

    def answer(self, variables: dict[str, Any], marked: list[str]) -> dict[str, str]:
        """Return `text`, or else `rejection` or `error`, whatever a template raises.

        Control tokens are marked in the variables that `marked` names.
        """
        try:
            if self._template is None:
                self._template = template_environment().from_string(self._source)
            marks = {name: self._control_tokens.mark(variables[name]) for name in marked}
            variables = variables | marks
            messages = [_with_reasoning(message) for message in variables["messages"]]
            text = self._render(variables | {"messages": messages})
            text.encode()
        except Rejection as error:
            return {"rejection": _short(str(error))}
        except Exception as error:
            name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            return {"error": _short(f"{name}{error}")}
        return {"text": text}

    def _render(self, variables: dict[str, Any]) -> str:
        pieces, left = [], self._max_characters
        for piece in self._template.generate(**variables):
            left -= len(piece)
            if left < 0:
                raise TemplateError(f"expected at most {self._max_characters} characters, got more")
            pieces.append(piece)
        return "".join(pieces)


def _short(message: str) -> str:
    return message[:500].encode(errors="replace").decode()


def _limit_memory(num_bytes: int) -> None:
    """Limit the address space of this process to what it has now and `num_bytes` more."""
    if not sys.platform.startswith("linux"):
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + num_bytes
    if hard not in (-1, resource.RLIM_INFINITY):
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(requests: BinaryIO, responses: BinaryIO) -> None:
    """Answer requests until the input ends.

    SIGPROF ends the process, whatever it does, once a request has taken its seconds of processor
    time: other processes of the machine do not count.
    """
    settings = json.loads(requests.readline())
    renderer = Renderer(
        settings["template"], settings["max_characters"], settings["control_tokens"]
    )
    _limit_memory(settings["memory_bytes"])
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_s"])
        request = json.loads(line)
        reply = json.dumps(renderer.answer(request["variables"], request["marked"])).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        responses.write(reply + b"\n")
        responses.flush()


if __name__ == "__main__":
    with suppress(BrokenPipeError, ValueError):  # the parent has ended, perhaps within a line
        serve(sys.stdin.buffer, sys.stdout.buffer)
