"""`transformers` behind OpenAI's completion API, in an environment that has it.

`python hugging_face.py FOLDER THREADS STREAMS DTYPE` prints its port and serves until its input
closes. A request with several prompts is one padded batch; requests follow one another.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class ChunkStreamer:
    """The receiver of `generate`'s tokens: one chunk of the answer for each step."""

    def __init__(self, tokenizer: Any, write: Callable[[dict[str, Any]], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._has_prompt = False

    def put(self, tokens: Any) -> None:
        """Write the tokens of one step, one per prompt; the first call brings the prompts."""
        if self._has_prompt:
            texts = [self._tokenizer.decode(token) for token in tokens.tolist()]
            choices = [{"index": i, "text": text} for i, text in enumerate(texts)]
            self._write({"choices": choices, "usage": None})
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing: the handler ends the answer."""


class GreedyModel:
    """A model in the Hugging Face layout that continues prompts with the likeliest tokens."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        ends = self._model.generation_config.eos_token_id
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or ())
        self._padding = self._ends[0] if self._ends else 0
        self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(self._padding)

    def generate(
        self, prompts: list[str], max_tokens: int, write: Callable[[dict[str, Any]], None]
    ) -> int:
        """Write a chunk for each step; return the number of tokens of all answers."""
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True)
        length = inputs["input_ids"].shape[1]
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=self._padding,
            streamer=ChunkStreamer(self._tokenizer, write),
        )
        return count_tokens(output[:, length:].tolist(), self._ends)


def count_tokens(answers: Iterable[Sequence[int]], ends: Sequence[int]) -> int:
    """Return the number of tokens of all answers, without the padding after an end token."""
    count = 0
    for answer in answers:
        stops = [i for i, token in enumerate(answer) if token in ends]
        count += stops[0] + 1 if stops else len(answer)
    return count


def make_handler(model: Any) -> type[BaseHTTPRequestHandler]:
    """Return a handler that streams the answers of a `GreedyModel`."""

    class Handler(BaseHTTPRequestHandler):
        """Answers each POST request as a completion."""

        def do_POST(self) -> None:
            """Stream the answer to the prompt, or to each of a list of prompts."""
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
            self.send_response(200)
            self.end_headers()
            count = model.generate(prompts, body["max_tokens"], self._send)
            self._send({"choices": [], "usage": {"completion_tokens": count}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, chunk: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    return Handler


def main() -> None:
    """Serve the model in the arguments."""
    folder, threads, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[4]
    os.environ["OMP_NUM_THREADS"] = threads  # OpenMP reads it when torch is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(int(threads))
    server = HTTPServer(("127.0.0.1", 0), make_handler(GreedyModel(folder, dtype)))
    Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
