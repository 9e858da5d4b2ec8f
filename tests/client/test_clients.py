"""The blocking and the asyncio client have the same methods with the same parameters."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from ladderstitch.client import AsyncClient, Client, generate_request, infer_request
from ladderstitch.client.generation import GenerateOptions
from ladderstitch.client.messages import InferOptions


def public_methods(client: type) -> dict[str, list[tuple[str, Any, Any]]]:
    """Return name, kind and default of the parameters of each public method."""
    methods = dict(inspect.getmembers(client, inspect.isfunction))
    return {
        name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
        for name, method in methods.items()
        if name == "__init__" or not name.startswith("_")
    }


def test_clients_have_equal_methods_and_parameters() -> None:
    assert public_methods(AsyncClient) == public_methods(Client)
    assert {"predict", "generate", "get_scheduling", "health"} <= public_methods(Client).keys()


@pytest.mark.parametrize(
    ("options", "request_builder"),
    [(InferOptions, infer_request), (GenerateOptions, generate_request)],
)
def test_client_options_equal_the_request_parameters(options: Any, request_builder: Any) -> None:
    parameters = inspect.signature(request_builder).parameters.values()
    keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert options.__annotations__.keys() == keywords


def test_ipv6_address_without_brackets_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"expected \[::1\]:8001, got ::1:8001"):
        Client("::1:8001")
