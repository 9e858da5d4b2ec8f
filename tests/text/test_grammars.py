"""Grammars of hostile callers: what they may cost, and what they may hold up."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from ladderstitch.errors import InvalidArgument
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.grammars import GrammarCompiler
from ladderstitch.text.scheduler.step_times import StepTimes
from tests.text.scheduler.stepped_group import SteppedScheduler

LIMIT_S = 300.0


@pytest.fixture
def compiler(tiny_language_bundle: TextBundle) -> GrammarCompiler:
    return GrammarCompiler(tiny_language_bundle.tokenizer(), [0])


async def test_grammars_hold_up_no_other_work(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, released = threading.Event(), threading.Event()
    compile_one = compiler.compile

    def compile_slowly(field: str, kind: object, source: str) -> object:
        started.set()
        assert released.wait(LIMIT_S)
        return compile_one(field, "regex", source)

    monkeypatch.setattr(compiler, "compile", compile_slowly)
    compiled = [
        asyncio.create_task(compiler.compile_in_thread("x", "regex", "a+")) for _ in range(64)
    ]
    async with asyncio.timeout(LIMIT_S):
        assert await asyncio.to_thread(started.wait, LIMIT_S)  # more than the default threads
        released.set()
        await asyncio.gather(*compiled)


def test_pattern_of_too_much_work_ends_its_own_answer_without_its_text(
    compiler: GrammarCompiler, capfd: pytest.CaptureFixture[str]
) -> None:
    matcher = compiler.compile("x", "regex", "((a{1,100}){1,100}){1,100}").matcher()

    def answer() -> None:
        for _ in range(10_000):
            matcher.add(int(np.nonzero(matcher.allowed(257))[0][-1]))

    with pytest.raises(InvalidArgument, match="too many expressions") as failure:
        answer()
    assert "Tokens" not in str(failure.value)
    assert capfd.readouterr().err == ""


async def test_first_grammar_finds_the_trie_of_its_model(
    tiny_language_bundle: TextBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = SteppedScheduler(tiny_language_bundle)

    async def measure_at_once(*_: object) -> StepTimes:
        return scheduler.times

    monkeypatch.setattr("ladderstitch.text.scheduler.scheduler.measure_steps", measure_at_once)
    await scheduler.measure()
    monkeypatch.setattr("ladderstitch.text.grammars.LLTokenizer", None)
    scheduler.grammars.compile("x", "regex", "a+")
    await scheduler.close()
