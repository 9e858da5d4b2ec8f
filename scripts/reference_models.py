"""Write random models of the installed transformers, and what transformers computes with them.

It runs in an environment with torch, transformers and peft only. Each model NAME gives
OUT/NAME/ (what `save_pretrained` writes), OUT/NAME.safetensors with `tokens` [B, T], `logits`
[B, T, V] and `greedy` [B, N], and for each adapter of PEFT OUT/NAME.one/ and OUT/NAME.two/ with its
`logits.one` and `logits.two`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.hugging_face_models import END, MORE, OWN, make_model

STORAGES = ("one file", "shards", "bin", "bin shards", "bfloat16")
"""Ways to store a model, in turn."""
SHARD_SIZE = "30KB"
LENGTH, PREFILL, NEW_TOKENS = 30, 11, 16
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 3, "lora_alpha": 6},
    "two": {"r": 5, "lora_alpha": 4, "use_rslora": True},
}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."}]
IS_VERSION_4 = transformers.__version__.startswith("4.")


def main() -> None:
    """Write all models into the folder given, and `models.json` with how each is stored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json for all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    storages = cycle_storages()
    for name in OWN | MORE:
        storage = next(storages)
        label = name.replace(", ", " ").replace(" ", "-")
        chat = write(options.out, label, make_model(name), storage, options.tokenizer)
        found[label] = {"storage": storage, "chat": chat}
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    facts = {"prefill": PREFILL, "chat": CHAT, "adapters": list(ADAPTERS)}
    text = json.dumps({"versions": versions, "models": found} | facts)
    (options.out / "models.json").write_text(text)


def cycle_storages() -> Iterator[str]:
    """Yield the storages in turn; transformers 5 writes no `.bin` files."""
    while True:
        yield from (s for s in STORAGES if IS_VERSION_4 or not s.startswith("bin"))


def write(out: Path, label: str, model: Any, storage: str, tokenizer: Path) -> list[int]:
    """Write a model with its tokenizer, adapters and results; return the tokens of `CHAT`."""
    folder = out / label
    if storage == "bfloat16":
        model.to(torch.bfloat16)
    options: dict[str, Any] = {"max_shard_size": SHARD_SIZE} if "shards" in storage else {}
    if storage.startswith("bin"):
        options["safe_serialization"] = False
    model.save_pretrained(folder, **options)
    chat = write_tokenizer(folder, tokenizer, is_inline=storage in ("one file", "bin"))
    model = (
        type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    )
    tokens = torch.randint(3, END, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    results = {"tokens": tokens, "logits": logits(model, tokens), "greedy": greedy(model, tokens)}
    for name, fields in ADAPTERS.items():
        results[f"logits.{name}"] = add_adapter(model, out / f"{label}.{name}", fields, tokens)
    save_file({k: v.contiguous() for k, v in results.items()}, out / f"{label}.safetensors")
    return chat


def write_tokenizer(folder: Path, tokenizer: Path, *, is_inline: bool) -> list[int]:
    """Write the tokenizer, and its chat template into its configuration or a file of its own."""
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), eos_token="<end>", chat_template=TEMPLATE
    )
    own.save_pretrained(folder, save_jinja_files=not is_inline)
    chat = own.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in chat]


@torch.inference_mode()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits [B, T, V] of one pass."""
    found: Tensor = model(tokens, use_cache=False).logits
    return found


@torch.inference_mode()
def greedy(model: Any, tokens: Tensor) -> Tensor:
    """Return the best next tokens [B, N] after the first ones, computed with a cache."""
    out = model(tokens[:, :PREFILL], use_cache=True)
    best = [out.logits[:, -1].argmax(-1)]
    while len(best) < NEW_TOKENS:
        out = model(best[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
        best.append(out.logits[:, -1].argmax(-1))
    return torch.stack(best, dim=1)


def add_adapter(model: Any, folder: Path, fields: dict[str, Any], tokens: Tensor) -> Tensor:
    """Write a random adapter of all matrices of the layers; return its logits, and remove it."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **fields)
    adapted = peft.get_peft_model(model, config)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:  # zeros at first
            tensor.data = 0.2 * torch.randn(tensor.shape)
    adapted.save_pretrained(folder)
    found = logits(adapted, tokens)
    adapted.unload()
    return found


if __name__ == "__main__":
    main()
