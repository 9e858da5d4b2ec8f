"""Costs of a change between the smallest and the largest path of a family: time and divergence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.messages import LogitsMode
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.scheduler.sequence import Sequence as AnswerInProgress
from ladderstitch.training.text.switches import PathRunner


def time_switches(
    runner: PathRunner, tokens: Tensor, pairs: Sequence[tuple[int, int]], rounds: int
) -> list[dict[str, object]]:
    """Return milliseconds of translating tokens [T], and of computing them again, by pair.

    Both alternate, so that a change of the machine's speed affects both.
    """
    found: list[dict[str, object]] = []
    for source, target in pairs:
        translate_s, prefill_s = [], []
        for _ in range(rounds + 1):
            runner.run(source, tokens, 0, LogitsMode.NONE)
            started = time.perf_counter()
            runner.translate(source, target, tokens)
            translated = time.perf_counter()
            runner.run(target, tokens, 0, LogitsMode.NONE)
            translate_s.append(translated - started)
            prefill_s.append(time.perf_counter() - translated)
        ratios = [b / a for a, b in zip(translate_s[1:], prefill_s[1:], strict=True)]
        found.append(
            {
                "source": source,
                "target": target,
                "tokens": len(tokens),
                "project_ms": round(1e3 * median(translate_s[1:]), 2),
                "prefill_ms": round(1e3 * median(prefill_s[1:]), 2),
                "prefill_over_project": round(median(ratios), 1),
            }
        )
    return found


@torch.inference_mode()
def divergence_by_mode(
    runner: PathRunner, source: int, target: int, windows: Tensor, context: int
) -> dict[str, float]:
    """Return nats per token from the target path's own predictions, by the way of the cache.

    `projected`: translated. `repaired`: translated, then computed again by the target path.
    `recomputed`: only the latter.
    """
    sums = {"projected": 0.0, "repaired": 0.0, "recomputed": 0.0}
    for window in windows:
        before, after = window[:context], window[context:]
        predict = partial(_predict, runner, target, after, context)
        runner.run(target, before, 0, LogitsMode.NONE)
        alone = predict()
        runner.run(source, before, 0, LogitsMode.NONE)
        runner.translate(source, target, before)
        predicted = {"projected": predict()}
        for begin in range(0, context, 64):
            part = before[begin : begin + 64]
            runner.run(target, part, begin, LogitsMode.NONE)
        predicted["repaired"] = predict()
        runner.run(source, before, 0, LogitsMode.NONE)
        runner.run(target, before, 0, LogitsMode.NONE)
        predicted["recomputed"] = predict()
        for mode, found in predicted.items():
            divergence = F.kl_div(found, alone, reduction="sum", log_target=True) / len(after)
            sums[mode] += float(divergence) / len(windows)
    return {mode: round(max(0.0, total), 7) for mode, total in sums.items()}


def _predict(runner: PathRunner, path: int, tokens: Tensor, start: int) -> Tensor:
    """Return the log probabilities [T, V] of tokens [T]."""
    return runner.run(path, tokens, start, LogitsMode.ALL).double().log_softmax(-1)


def time_decisions(scheduler: TextScheduler, tokens: int, repeats: int) -> dict[str, float]:
    """Return milliseconds of deciding on and making a change whose planes are written through."""
    candidates, rules = scheduler.candidates, scheduler.cache_rules
    scheduler.apply_settings(SchedulerSettings(cache_mode="write-through"))
    seconds = []
    for _ in range(repeats):
        answer = _decoding_answer(scheduler, rules, candidates.frontier[0], tokens)
        started = time.perf_counter()
        changes = scheduler._change_rules.plan([answer], scheduler.times, time.monotonic())
        for change in changes:
            scheduler._runner.cache_changes.change(change.sequence, change.variant, "write-through")
        pending = answer.next_translations()
        seconds.append(time.perf_counter() - started)
        assert changes, "an answer without a budget goes on with the best path"
        assert not pending, "nothing is left to translate"
    return {
        "p50_ms": round(1e3 * median(seconds), 4),
        "p99_ms": round(1e3 * quantiles(seconds, n=100)[-1], 4),
    }


def _decoding_answer(
    scheduler: TextScheduler, rules: CacheRules, variant: int, tokens: int
) -> AnswerInProgress:
    """Return an answer that is being decoded, with all planes of its cached tokens written."""
    request = GenerationRequest((1,) * tokens, time.monotonic(), 64, budget=TokenBudget())
    answer = AnswerInProgress(
        request,
        variant,
        scheduler.variant_names,
        None,
        scheduler.tokenizer,
        (),
        rules,
    )
    answer.history.append(answer.kind, tokens - 1, rules.other_kinds(variant))
    answer.block_table.num_computed = tokens - 1
    answer.pace.add_token(time.monotonic())
    return answer
