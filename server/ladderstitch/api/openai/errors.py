"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from ladderstitch.errors import InvalidArgument, Overloaded, RequestError, Unauthenticated

Body = dict[str, Any]
HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""HTTP status by the name of the gRPC status."""
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""The `type` of an error by its HTTP status."""
BODY = "body"
"""The field of errors that concern the whole body."""


class BodyRejected(Exception):
    """A body that is refused with an HTTP status before any field of it is known."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def error_body(error: RequestError) -> Body:
    """Return `{"error": {...}}`; its `code` is the reason that gRPC callers get."""
    status = HTTP_STATUS[error.code]
    return {
        "error": {
            "message": str(error),
            "type": ERROR_TYPES.get(status, "server_error"),
            "param": _parameter(error),
            "code": error.reason,
        }
        | ({"metadata": error.metadata} if error.metadata else {})
    }


def _parameter(error: RequestError) -> str | None:
    """Return the field that an error is about; None if it is the whole body."""
    field = error.field if isinstance(error, InvalidArgument) else BODY
    return None if field == BODY else field


def error_response(error: RequestError) -> JSONResponse:
    """Return the HTTP response of an error, with the time to wait before a retry if it has one."""
    headers = {}
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(max(1, round(1e3 * error.retry_after_s)))
    return JSONResponse(error_body(error), HTTP_STATUS[error.code], headers)
