"""Folders of transformers 4 and 5, and adapters of PEFT: compare this server with their authors.

Each version runs in an environment of its own in the cache, where `reference_models.py` writes
random models of all architectures, stored in several ways, and what transformers computes with
them. The comparison uses the serving forward pass of this installation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from ladderstitch.errors import LadderstitchError
from ladderstitch.importers.verify_text import GoldenRun, fitting_rank_counts, run_case
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.hugging_face.adapter import lay_out, read_adapter
from ladderstitch.text.model.layout import LaidOutWeights
from ladderstitch.text.model.weight_reader import DeltaWeights, Weights
from ladderstitch_loadtest.servers.peer_environments import (
    CPU_TORCH,
    Requirements,
    installed_python,
)
from ladderstitch_loadtest.servers.results_io import write
from tests.support.language_models import write_byte_tokenizer

ENVIRONMENTS = tuple(
    Requirements((CPU_TORCH, f"transformers=={version}", "peft==0.21.2"))
    for version in ("4.57.6", "5.23.0")
)
LIMIT = 1e-4
"""Largest allowed difference of logits, relative to the largest logit."""


def main() -> int:
    """Return 1 if a model cannot be loaded, or if its answers differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for own-models.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, found = time.monotonic(), {}
    for environment in ENVIRONMENTS:
        with tempfile.TemporaryDirectory() as folder:
            found[environment.packages[1]] = compare_all(environment, Path(folder))
    failed = [m for models in found.values() for m in models["models"].values() if not m["passed"]]
    summary = {
        "limit": LIMIT,
        "seconds": round(time.monotonic() - started),
        "failed": len(failed),
        "largest_difference": max(models["largest_difference"] for models in found.values()),
    }
    write(options.out, "own-models", summary | {"versions": found})
    sys.stdout.write(json.dumps(summary) + "\n")
    return int(bool(failed))


def compare_all(environment: Requirements, folder: Path) -> dict[str, Any]:
    """Return the figures of all models that an environment writes into a folder."""
    tokenizer = folder / "tokenizer.json"
    write_byte_tokenizer(tokenizer)
    script = str(Path(__file__).with_name("reference_models.py"))
    command = [str(installed_python(environment)), script, str(folder)]
    subprocess.run([*command, "--tokenizer", str(tokenizer)], check=True)
    written = json.loads((folder / "models.json").read_text())
    models = {}
    for name, stored in written["models"].items():
        models[name] = compare(folder, name, stored, written)
        sys.stdout.write(f"{written['versions']['transformers']} {name}: {models[name]}\n")
    differences = [m["difference"] for m in models.values()]
    differences += [d for m in models.values() for d in m["adapters"].values()]
    return written["versions"] | {"largest_difference": max(differences), "models": models}


def compare(
    folder: Path, name: str, stored: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures of one model; a model that is refused has the reason."""
    expected = load_file(folder / f"{name}.safetensors")
    found: dict[str, Any] = {"storage": stored["storage"], "passed": False}
    try:
        bundle = TextBundle.load(folder / name)
        found |= compare_answers(bundle, expected, facts["prefill"])
        found["chat"] = chat_tokens(bundle, facts["chat"]) == stored["chat"]
        weights = LaidOutWeights(
            bundle.open_files(), bundle.manifest.layout, bundle.manifest.config
        )
        found["adapters"] = {
            adapter: difference_of_adapter(bundle, weights, folder / f"{name}.{adapter}", expected)
            for adapter in facts["adapters"]
        }
    except LadderstitchError as error:
        return found | {"difference": float("inf"), "adapters": {}, "refused": str(error)}
    found["passed"] = (
        max(found["difference"], *found["adapters"].values()) <= LIMIT
        and found["greedy_tokens_equal"] == found["greedy_tokens"]
        and found["chat"]
    )
    return found


def compare_answers(
    bundle: TextBundle, expected: Mapping[str, Tensor], prefill: int
) -> dict[str, Any]:
    """Return the difference of logits on all rank counts, and the greedy tokens that agree."""
    config, residual = bundle.manifest.config, bundle.manifest.variants[0].residual
    tokens, weights, ranks = expected["tokens"], bundle.weights(), fitting_rank_counts(config)
    difference = max(
        difference_of(bundle, weights, expected["tokens"], expected["logits"], count, prefill)
        for count in ranks
    )
    new = expected["greedy"].shape[1]
    greedy = GoldenRun("", residual, (1,), incremental=True, greedy_tokens=new)
    chosen = run_case(config, weights, tokens[:, :prefill], greedy, 1, prefill).argmax(-1)
    return {
        "ranks": ranks,
        "difference": difference,
        "greedy_tokens": chosen.numel(),
        "greedy_tokens_equal": int((chosen == expected["greedy"]).sum()),
    }


def difference_of(
    bundle: TextBundle,
    weights: Weights,
    tokens: Tensor,
    expected: Tensor,
    ranks: int,
    prefill: int,
) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    run = GoldenRun("", bundle.manifest.variants[0].residual, (ranks,), incremental=True)
    got = run_case(bundle.manifest.config, weights, tokens, run, ranks, prefill)
    return float((got - expected).abs().max() / expected.abs().max())


def difference_of_adapter(
    bundle: TextBundle, weights: LaidOutWeights, folder: Path, expected: Mapping[str, Tensor]
) -> float:
    """Return the difference of logits with an adapter, as `difference_of` does."""
    changed = DeltaWeights(weights, lay_out(read_adapter(folder), weights))
    name = folder.name.rpartition(".")[2]
    return difference_of(bundle, changed, expected["tokens"], expected[f"logits.{name}"], 1, 9)


def chat_tokens(bundle: TextBundle, messages: list[dict[str, str]]) -> list[int]:
    """Return the tokens of a chat, rendered by the template of the folder."""
    template = bundle.chat_template(bundle.tokenizer())
    if template is None:
        return []
    try:
        return list(asyncio.run(template.encode(messages)))
    finally:
        template.close()


if __name__ == "__main__":
    sys.exit(main())
