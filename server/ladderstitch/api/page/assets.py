"""The files of the page: read once, compressed, and sent with headers that keep it to itself.

They hold no data of the server, so that a browser may load them before its user enters a token.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response

STATIC = Path(__file__).with_name("static")
INDEX = "index.html"
PREFIX = "/page/"
SUFFIXES = {".html", ".css", ".js", ".svg"}
MIN_COMPRESSED_BYTES = 1024
"""Smaller files are sent as they are."""

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers of every file: scripts, styles and requests of the server's own origin only."""
CHECKED = "no-cache"
"""Browsers keep the file, and ask whether it has changed before they use it."""
VERSIONED = "public, max-age=31536000, immutable"
"""The name of the file holds its version, so that it never changes."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, as it is and compressed; `compressed` is None for a small one."""

    content: bytes
    compressed: bytes | None
    media_type: str
    cache_control: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> Asset:
        """Return a file with its headers."""
        content = path.read_bytes()
        return cls(
            content,
            gzip.compress(content, mtime=0) if len(content) >= MIN_COMPRESSED_BYTES else None,
            mimetypes.guess_type(path.name)[0] or "application/octet-stream",
            VERSIONED if path.parent.name == "vendor" else CHECKED,
            f'"{hashlib.sha256(content).hexdigest()[:16]}"',
        )

    def respond(self, request: Request) -> Response:
        """Return the file, or 304 to a browser that has it."""
        headers = SECURITY_HEADERS | {
            "cache-control": self.cache_control,
            "etag": self.etag,
            "vary": "accept-encoding",
        }
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content = self.content
        if self.compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
            content = self.compressed
            headers["content-encoding"] = "gzip"
        return Response(content, headers=headers, media_type=self.media_type)


@cache
def page_assets() -> dict[str, Asset]:
    """Return all files of the page by the path of their URL."""
    files = sorted(path for path in STATIC.rglob("*") if path.suffix in SUFFIXES)
    return {_url_path(file.relative_to(STATIC)): Asset.read(file) for file in files}


def _url_path(file: Path) -> str:
    return "/" if file.name == INDEX else PREFIX + file.as_posix()
