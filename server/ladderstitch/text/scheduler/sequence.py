"""One answer on its way: its tokens, how many of them the caches hold, and its caller's pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import numpy as np

from ladderstitch.errors import RequestError
from ladderstitch.scheduling.profiles import Quality
from ladderstitch.scheduling.requests import (
    FinishReason,
    GenerationInfo,
    GenerationRequest,
    TokenChunk,
)
from ladderstitch.text.sampler import Sampler
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.step_times import due
from ladderstitch.text.step import Logits, LogitsMode, SequenceInput
from ladderstitch.text.tokenizer import StoppableText, TextStream, TextTokenizer


class Sequence_:
    """A request, its prompt and the tokens of its answer so far.

    The first `computed` of `tokens` are in the caches, in `blocks`. A sequence that lost its
    blocks (another one needed them, or a rank died) computes its tokens again and goes on.
    """

    def __init__(
        self,
        request: GenerationRequest,
        path: int,
        name: str,
        quality: Quality | None,
        tokenizer: TextTokenizer,
        end_tokens: Collection[int],
    ) -> None:
        self.request, self.path = request, path
        self.tokens = list(request.tokens)
        self.computed = 0
        self.blocks: list[int] = []
        self.losses = 0
        self.first_at: float | None = None
        self._name, self._quality = name, quality
        self._end_tokens = end_tokens
        self._sampler = Sampler(request.sampling)
        self._text = StoppableText(TextStream(tokenizer), request.stop)
        self._started_at: float | None = None
        self._reused = 0
        self._last_known = 0  # number of the last block that the pool remembers
        self._remembered = 0
        self._pieces: asyncio.Queue[TokenChunk | RequestError] = asyncio.Queue()
        self.ended = False

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed; one while decoding."""
        return len(self.tokens) - self.computed

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.request.tokens)

    @property
    def begun(self) -> bool:
        """Whether it has ever been computed on."""
        return self._started_at is not None

    @property
    def want(self) -> LogitsMode:
        """Of the logits after its last token."""
        greedy = self.request.sampling.temperature == 0 and self.request.logprobs is None
        return LogitsMode.BEST if greedy else LogitsMode.LAST

    def due(self, token_s: float) -> float:
        """When its next token is wanted; one takes `token_s` at least."""
        request = self.request
        return due(
            request.budget, request.arrival, self.first_at, self.made, request.max_tokens, token_s
        )

    def admit(self, pool: BlockManager, now: float) -> bool:
        """Take blocks for all of its tokens, remembered ones where they fit; False without room."""
        scope = pool.scope((self.path, self.request.tenant))
        prefix = pool.find(scope, self.tokens)
        pool.share(prefix)
        fresh = pool.needed(len(self.tokens)) - len(prefix.blocks)
        taken = pool.take(fresh, after=prefix.blocks[-1] if prefix.blocks else None)
        if taken is None:
            pool.release(prefix.blocks)
            return False
        self.blocks = [*prefix.blocks, *taken]
        self.computed = len(prefix.blocks) * pool.block_tokens
        self._last_known, self._remembered = prefix.last, len(prefix.blocks)
        if self._started_at is None:
            self._started_at, self._reused = now, self.computed
        return True

    def grow(self, pool: BlockManager) -> bool:
        """Take a block for the next token if it needs one; False without room."""
        if len(self.blocks) >= pool.needed(len(self.tokens)):
            return True
        taken = pool.take(1, after=self.blocks[-1])
        self.blocks += taken or []
        return taken is not None

    def retreat(self, pool: BlockManager) -> None:
        """Give up the blocks; what is full of them may be found again."""
        pool.release(self.blocks)
        self.blocks, self.computed = [], 0

    def run(self, count: int) -> SequenceInput:
        """The next `count` of its tokens, as ranks compute them."""
        end = self.computed + count
        want = self.want if end == len(self.tokens) else LogitsMode.NONE
        return SequenceInput(self.tokens[self.computed : end], self.computed, self.blocks, want)

    def advance(self, count: int, pool: BlockManager) -> None:
        """So many tokens were computed; blocks that are full now may serve others."""
        self.computed += count
        size = pool.block_tokens
        while (self._remembered + 1) * size <= self.computed:
            at = self._remembered
            tokens = self.tokens[at * size : (at + 1) * size]
            self._last_known = pool.remember(self.blocks[at], self._last_known, tokens)
            self._remembered += 1

    def accept(self, best: int | None, logits: Logits | None, now: float) -> None:
        """The next token: the likeliest, or one drawn from logits [V]; hand it to the caller."""
        token = best if best is not None else self._draw(logits)
        if self.first_at is None:
            self.first_at = now
        index = self.made
        self.tokens.append(token)
        ended = token in self._end_tokens
        text = "" if ended else self._text.add(token)
        finish: FinishReason | None = None
        if ended or self._text.stopped:
            finish = "stop"
        elif index + 1 == self.request.max_tokens:
            finish = "length"
        if finish is not None:
            text += self._text.finish()
            self.ended = True
        logprob, alternatives = self._likelihoods(token, logits)
        self._pieces.put_nowait(
            TokenChunk(index, token, text, self._answer(), finish, logprob, alternatives)
        )

    def fail(self, error: RequestError) -> None:
        """End the answer with an error."""
        self.ended = True
        self._pieces.put_nowait(error)

    async def next_piece(self) -> TokenChunk:
        """The caller's next piece, or the error that the answer ended with."""
        piece = await self._pieces.get()
        if isinstance(piece, RequestError):
            raise piece
        return piece

    def _answer(self) -> GenerationInfo:
        assert self._started_at is not None, "set when it was admitted"
        queue_s = self._started_at - self.request.arrival
        return GenerationInfo(self.path, self._name, self._quality, queue_s, self._reused)

    def _draw(self, logits: Logits | None) -> int:
        assert logits is not None, "what `want` asked for"
        return self._sampler.pick(logits)

    def _likelihoods(
        self, token: int, logits: Logits | None
    ) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        if self.request.logprobs is None or logits is None:
            return None, ()
        shifted = logits.astype(np.float64) - logits.max()
        logs = shifted - np.log(np.exp(shifted).sum())
        most = min(self.request.logprobs, len(logs))
        top = np.argpartition(-logs, most - 1)[:most] if most else np.array([], np.int64)
        top = top[np.argsort(-logs[top], kind="stable")]
        return float(logs[token]), tuple((int(t), float(logs[t])) for t in top)
