"""Errors in the form that clients of OpenAI's API expect."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from ladderstitch.errors import BadInput, Overloaded, RequestError, Unauthenticated

STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""gRPC status -> HTTP status."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}


def body_of(error: RequestError) -> dict[str, Any]:
    """`{"error": {...}}`; `code` is the reason that gRPC callers get."""
    status = STATUS[error.code]
    return {
        "error": {
            "message": str(error),
            "type": KINDS.get(status, "server_error"),
            "param": error.field if isinstance(error, BadInput) else None,
            "code": error.reason,
        }
        | ({"metadata": error.metadata} if error.metadata else {})
    }


def response_to(error: RequestError) -> JSONResponse:
    headers = {}
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(max(1, round(1e3 * error.retry_after_s)))
    return JSONResponse(body_of(error), STATUS[error.code], headers)
