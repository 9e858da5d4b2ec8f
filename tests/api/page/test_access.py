"""Who gets the page: its files hold no data and need no token, its JSON API needs one."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ladderstitch.api.page.assets import page_assets
from tests.api.page.served_page import MODEL, SECRET, ServedPage, served_page

DATA = ("/v1/page/models", f"{MODEL}/figures", f"{MODEL}/examples/first-01.png")
BEARER = {"authorization": f"Bearer {SECRET}"}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def locked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServedPage]:
    async with served_page(tmp_path_factory.mktemp("page"), tokens=True) as page:
        yield page


async def test_files_need_no_token_and_data_do(locked: ServedPage) -> None:
    for path in page_assets():
        answer = await locked.http.get(path)
        assert answer.status_code == 200
        assert "tiny" not in answer.text
        assert "replica-7" not in answer.text
    for path in DATA:
        answer = await locked.http.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert (await locked.http.get(path, headers=BEARER)).status_code == 200
    answer = await locked.http.post(f"{MODEL}/predict", json={"example": "first-01.png"})
    assert answer.status_code == 401
    total = (await locked.get(f"{MODEL}/figures", **BEARER))["total"]
    assert (total["answered"], total["rejected"]) == (0, 0)


@pytest.mark.parametrize("path", ["/page/none.js", "/page/../config.py", "/page/%2e%2e/routes.py"])
async def test_only_files_of_the_page_are_open(locked: ServedPage, path: str) -> None:
    assert (await locked.http.get(path)).status_code == 401
    assert (await locked.http.get(path, headers=BEARER)).status_code == 404
    assert (await locked.http.post("/", content=b"x")).status_code == 401


async def test_page_that_is_off_is_not_there(tmp_path: Path) -> None:
    async with served_page(tmp_path, page=False) as served:
        for path in ("/", "/page/page.css", *DATA):
            assert (await served.http.get(path)).status_code == 404


@pytest.mark.parametrize("path", sorted(page_assets()))
async def test_file_has_its_headers(locked: ServedPage, path: str) -> None:
    answer = await locked.http.get(path, headers={"accept-encoding": "gzip"})
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = await locked.http.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = await locked.http.get(path, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == answer.content, "what a client decompresses is the same"
    is_versioned = "/vendor/" in path
    assert ("immutable" in answer.headers["cache-control"]) == is_versioned
    compressed = page_assets()[path].compressed
    assert compressed is None or gzip.decompress(compressed) == plain.content
    assert (await locked.http.head(path)).status_code == 200
