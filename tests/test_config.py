"""The committed configuration shows every field with its default, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve.yaml"


def test_the_example_shows_every_field_with_its_default() -> None:
    assert ServerConfig.load(EXAMPLE) == ServerConfig()
    shown = yaml.safe_load(EXAMPLE.read_text())
    hidden = {"bundle"}  # a path of the installation
    assert shown.keys() == ServerConfig.model_fields.keys() - hidden
    scheduling = type(ServerConfig().scheduling).model_fields.keys()
    assert shown["scheduling"].keys() == scheduling - {"stitch"}  # of the policy `fixed` only


def test_flags_override_the_file() -> None:
    assert ServerConfig.load(EXAMPLE, port=9, host=None).port == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "prot"),
        ("port: 99999", "port"),
        ("scheduling: {policy: best}", "scheduling.policy"),
        ("scheduling: {policy: fixed}", "the policy `fixed` needs one"),
        ("{replicas: 2, http_port: 8081}", "http_port: expected replicas: 1"),
        ("[1]", "expected a mapping"),
        (": {", "mapping"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        ServerConfig.load(path)
