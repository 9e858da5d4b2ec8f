"""What the files of the page may hold, and which servers offer it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from ladderstitch.api.page.assets import STATIC
from ladderstitch.config import DEFAULT_HTTP_PORT, ServerConfig


def test_page_has_no_inline_code_and_names_no_other_host() -> None:
    for file in STATIC.rglob("*"):
        if file.suffix not in {".html", ".css", ".js", ".svg"} or file.parent.name == "vendor":
            continue
        text = file.read_text()
        hosts = set(re.findall(r"https?://[^\s\"'`)]+", text))
        assert hosts <= {"http://www.w3.org/2000/svg"}, file
        if file.suffix == ".html":
            assert re.findall(r"<script(?![^>]*\bsrc=)", text) == []
            assert re.findall(r"<style|\sstyle=|\son\w+=", text) == []


@pytest.mark.parametrize(
    ("fields", "serves"),
    [
        ({}, False),
        ({"http_port": 0}, True),
        ({"http_port": 0, "page": "off"}, False),
        ({"host": "0.0.0.0", "insecure_public": True, "http_port": 0}, False),
        ({"host": "0.0.0.0", "insecure_public": True, "http_port": 0, "page": "on"}, True),
        (
            {"host": "0.0.0.0", "insecure_public": True, "http_port": 0, "token_file": "t.yaml"},
            True,
        ),
    ],
)
def test_page_is_on_for_this_machine_or_behind_tokens(fields: dict[str, Any], serves: bool) -> None:
    assert ServerConfig.model_validate(fields).serves_page is serves


def test_page_opens_the_default_port_on_loopback_only() -> None:
    assert ServerConfig(page="on", port=8002).with_default_http().http_port == DEFAULT_HTTP_PORT
    assert ServerConfig(page="on", http_port=1).with_default_http().http_port == 1
    with pytest.raises(ValidationError, match="page: expected http_port along with it"):
        ServerConfig(page="on", host="10.0.0.1", insecure_public=True)
    with pytest.raises(ValidationError, match="page: expected http_port along with it"):
        ServerConfig(page="on", http_port=None)
