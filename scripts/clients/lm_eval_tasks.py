# /// script
# dependencies = ["lm-eval[api]==0.4.13", "transformers==5.24.0"]
#
# [tool.ladderstitch]
# package = "lm-eval"
# ///
"""The evaluation harness: a multiple-choice and a generative task on local data."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
from lm_eval.tasks import TaskManager

URL, MODEL = os.environ["LADDERSTITCH_HTTP"], os.environ["LADDERSTITCH_TEXT_MODEL"]
BUNDLE = os.environ["LADDERSTITCH_TEXT_BUNDLE"]
DATA = [
    {"question": "The cat sat on the", "choices": ["mat", "of", "running"], "answer": 0},
    {"question": "Two and two are", "choices": ["green", "four", "between"], "answer": 1},
    {"question": "He opened the door and", "choices": ["went in", "blue", "seven"], "answer": 0},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(task: str) -> object:
    """Return the scores of a task."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in DATA))
        for name, text in (("choice", CHOICE), ("generate", GENERATE)):
            (Path(folder) / f"{name}.yaml").write_text(text.format(file=file))
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{URL}/completions",
                "tokenizer": BUNDLE,  # counts the tokens of contexts
                "tokenizer_backend": "huggingface",
                "num_concurrent": 2,
                "max_length": 512,
            },
            tasks=[task],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
        )
    scores = found["results"][task]
    assert len(found["samples"][task]) == len(DATA)
    return {name.partition(",")[0]: value for name, value in scores.items() if "," in name}


if __name__ == "__main__":
    print("ok multiple choice:", evaluate("local_choice"))
    print("ok generative:", evaluate("local_generate"))
