"""The options of `generate` that change which tokens an answer may have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.errors import ConfigError

PANEL = "Sampling"
RULES = "What an answer may be"

Temperature = Annotated[
    float,
    typer.Option(
        help="Sampling temperature (0: always the most likely token).", rich_help_panel=PANEL
    ),
]
TopK = Annotated[
    int,
    typer.Option(help="Sample from the k most likely tokens (0: off).", rich_help_panel=PANEL),
]
TopP = Annotated[
    float,
    typer.Option(
        help="Sample from the most likely tokens of this total probability.", rich_help_panel=PANEL
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        help="Sample from tokens with at least this share of the highest probability (0: off).",
        rich_help_panel=PANEL,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of the sampling; equal seeds give equal tokens.", rich_help_panel=PANEL
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(
        help="Subtracted from logits of tokens that the answer has, -2 to 2.", rich_help_panel=PANEL
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        help="The same, for each time that the answer has the token.", rich_help_panel=PANEL
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Divides positive logits of tokens of prompt and answer, above 0 to 10 (default: 1).",
        rich_help_panel=PANEL,
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN=BIAS",
        help="Added to the logit of a token, -100 to 100, e.g. 17=-100; repeatable.",
        rich_help_panel=PANEL,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text before which the answer ends; repeatable.", rich_help_panel=RULES),
]
StopTokens = Annotated[
    list[int] | None,
    typer.Option(
        "--stop-token",
        help="Id of a token that ends the answer, as an end token does; repeatable.",
        rich_help_panel=RULES,
    ),
]
MinTokens = Annotated[
    int,
    typer.Option(help="Minimum number of tokens to generate.", rich_help_panel=RULES),
]
IgnoreEnd = Annotated[
    bool,
    typer.Option("--ignore-end", help="Go on after end tokens.", rich_help_panel=RULES),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEMA",
        help='JSON schema that the answer matches: a file, or its text (`{"type": "object"}`: any '
        "object).",
        rich_help_panel=RULES,
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(help="Regular expression that the answer matches.", rich_help_panel=RULES),
]


def parse_logit_bias(entries: Sequence[str]) -> dict[int, float]:
    """Return the bias of each token; raises `ConfigError` unless all entries are TOKEN=BIAS."""
    biases = {}
    for entry in entries:
        token, _, bias = entry.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise ConfigError(
                f"logit-bias: expected TOKEN=BIAS, such as 17=-100, got {entry!r}"
            ) from None
    return biases


def read_schema(schema: str | None, regex: str | None) -> str | None:
    """Return the text of a JSON schema that is given as text or as a file; None without one.

    Raises `ConfigError` if a regular expression is given, too, and for anything but JSON.
    """
    if schema is None:
        return None
    if regex is not None:
        raise ConfigError("regex: expected none along with --json-schema, got both")
    text = schema
    try:
        if not schema.lstrip().startswith("{"):
            text = Path(schema).read_text()
        json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"json-schema: expected a file of JSON, or its text, got {schema[:80]!r}: {error}"
        ) from None
    return text
