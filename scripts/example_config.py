"""Write examples/serve.yaml: every field of `ladderstitch serve --config` with its default.

`--check` compares instead, and exits with 1 if the file is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ladderstitch.config import ServerConfig

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "serve.yaml"
HEAD = """\
# Every field of `ladderstitch serve --config`, with its default; options override the file.
# Written by scripts/example_config.py.

# model bundle directory (default: the embedded Fashion-MNIST family)
# bundle: path/to/bundle
"""


def lines(model: type[BaseModel], indent: str = "") -> Iterator[str]:
    """Yield a comment and a line for each field; nested models are indented."""
    for name, field in model.model_fields.items():
        if name == "bundle":
            continue
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield f"\n{indent}# may change while the server runs: `ladderstitch schedule`"
            yield f"{indent}{name}:"
            yield from lines(type(default), indent + "  ")
        else:
            yield f"{indent}# {described(field)}"
            yield f"{indent}{name}: {scalar(default)}"


def described(field: FieldInfo) -> str:
    """Return the field's description; it must have one."""
    if not field.description:
        raise ValueError(f"expected a description, got none: {field}")
    return field.description


def scalar(value: Any) -> str:
    """Return a value as YAML writes it on one line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def main() -> int:
    """Write or compare the example."""
    text = HEAD + "\n".join(lines(ServerConfig)) + "\n"
    if "--check" in sys.argv[1:]:
        return int(EXAMPLE.read_text() != text)
    EXAMPLE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
