"""Penalties and biases of extreme sizes and numbers."""

from __future__ import annotations

import numpy as np
import pytest

from ladderstitch.scheduling.generation import GenerationRequest
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.text.scheduler.sampler import TokenChooser

LOGITS = np.array([3.0, 2.0, -1.0, 0.0, 2.5], np.float32)


def choose(prompt: tuple[int, ...] = (4,), **options: object) -> int:
    """Return the likeliest of five tokens by these options."""
    sampling = Sampling(**options)  # type: ignore[arg-type]
    return TokenChooser(GenerationRequest(prompt, 0.0, sampling=sampling), ()).choose(LOGITS)


@pytest.mark.parametrize("penalty", [5e-324, 1e-45, 1e-38, 1e-30, 0.1])
def test_tiny_repetition_penalty_prefers_tokens_of_the_prompt(penalty: float) -> None:
    assert choose((1, 2, 3), repetition_penalty=penalty) == 1


def test_biases_of_one_token_add_up() -> None:
    assert choose(logit_bias=((2, 3.0), (1, 0.5), (2, 1.5))) == 2
    assert choose(logit_bias=((2, 3.0), (1, 0.5), (2, 0.5))) == 0


def test_biases_cost_a_step_no_more_than_their_tokens() -> None:
    sampling = Sampling(logit_bias=((1, 1e-6),) * 100_000 + ((2, 5.0),))
    chooser = TokenChooser(GenerationRequest((4,), 0.0, sampling=sampling), ())
    assert [array.shape for array in (chooser._biased, chooser._biases)] == [(2,), (2,)]
    assert chooser.choose(LOGITS) == 2
