"""The errors that this package raises, as one tree; each class has a gRPC status and a reason.

LadderstitchError
├── UserError                     wrong files or options: the command line prints it, exits with 2
│   ├── ConfigError
│   ├── DataError
│   └── BundleError
└── RequestError                  ends one request; `api.status` translates it to a status
    ├── InvalidArgument           INVALID_ARGUMENT     INVALID_ARGUMENT
    ├── ModelNotFound             NOT_FOUND            MODEL_NOT_FOUND
    ├── VariantNotFound           NOT_FOUND            VARIANT_NOT_FOUND
    ├── BudgetInfeasible          FAILED_PRECONDITION  BUDGET_INFEASIBLE
    ├── QualityUnavailable        FAILED_PRECONDITION  QUALITY_UNAVAILABLE
    ├── Overloaded                RESOURCE_EXHAUSTED   OVERLOADED
    │   └── RateLimited           RESOURCE_EXHAUSTED   RATE_LIMITED
    ├── NonFiniteOutput           OUT_OF_RANGE         NON_FINITE_OUTPUT
    ├── ExpiredInQueue            DEADLINE_EXCEEDED    EXPIRED_IN_QUEUE
    ├── ExpiredInCompute          DEADLINE_EXCEEDED    EXPIRED_IN_COMPUTE
    ├── NotReady                  UNAVAILABLE          NOT_READY
    ├── Draining                  UNAVAILABLE          DRAINING
    ├── EngineRestarting          UNAVAILABLE          ENGINE_RESTARTING
    ├── Unsupported               UNIMPLEMENTED        UNSUPPORTED
    ├── Unauthenticated           UNAUTHENTICATED      UNAUTHENTICATED
    ├── PermissionDenied          PERMISSION_DENIED    PERMISSION_DENIED
    └── InternalError             INTERNAL             INTERNAL
"""

from __future__ import annotations

import logging
import uuid
from typing import ClassVar

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1000
"""Maximum length of the message of a `RequestError`, in bytes of UTF-8.

gRPC clients drop a status, and report RESOURCE_EXHAUSTED instead, if its metadata exceed 8 KiB: at
random up to 16 KiB, always above (grpc/grpc issue 37852). A message takes up to three bytes on the
wire for each of its bytes, and is in the details twice.
"""
MAX_METADATA_BYTES = 200
"""Maximum length of a value in the metadata of a `RequestError`, in bytes of UTF-8."""
MAX_NOTE_BYTES = 50
"""Maximum length of the note in a text whose middle is left out."""


def shorten(text: str, max_bytes: int) -> str:
    """Return a text of at most `max_bytes` of UTF-8, which begins and ends as `text`.

    The middle of a longer text is replaced by a note of the number of characters left out. Lone
    surrogates, which UTF-8 cannot express, are escaped.
    """
    # All characters beyond the limit are in the middle: encoding them would be wasted work.
    head, tail = text[:max_bytes], text[max_bytes:][-max_bytes:]
    encoded = [part.encode(errors="backslashreplace") for part in (head, tail)]
    if len(encoded[0]) + len(encoded[1]) <= max_bytes:
        return b"".join(encoded).decode()
    most = max_bytes - MAX_NOTE_BYTES
    first = encoded[0][: most - most // 3].decode(errors="ignore")
    last = b"".join(encoded)[-(most // 3) :].decode(errors="ignore")
    return f"{first} ... ({len(text) - len(first) - len(last)} characters left out) ... {last}"


class LadderstitchError(Exception):
    """The base class of all errors that this package raises deliberately."""


class UserError(LadderstitchError):
    """An error that the user of the command line can fix."""


class ConfigError(UserError):
    """A configuration file or an option is wrong."""


class DataError(UserError):
    """A data file is missing or malformed."""


class BundleError(UserError):
    """A model bundle is incomplete, inconsistent or of an unsupported version."""


class RequestError(LadderstitchError):
    """An error that ends one request with a status.

    `code` is the name of the gRPC status, `reason` a machine-readable constant, and `metadata` is
    sent to the caller in `google.rpc.ErrorInfo`. Messages may quote input of any length: the middle
    of one that exceeds `MAX_MESSAGE_BYTES` is left out.
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(shorten(message, MAX_MESSAGE_BYTES))
        self.metadata = {key: shorten(value, MAX_METADATA_BYTES) for key, value in metadata.items()}


class InvalidArgument(RequestError):
    """The request is malformed; `field` is the path of the offending field."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        field = shorten(field, MAX_METADATA_BYTES)
        super().__init__(f"{field}: {message}", field=field)
        self.field = field


class ModelNotFound(RequestError):
    """The server has no model of that name and version."""

    code = "NOT_FOUND"
    reason = "MODEL_NOT_FOUND"


class VariantNotFound(RequestError):
    """The model has no variant of that id."""

    code = "NOT_FOUND"
    reason = "VARIANT_NOT_FOUND"


class BudgetInfeasible(RequestError):
    """The hard deadline is earlier than the fastest admissible variant can answer alone.

    The metadata holds `min_feasible_us`, the smallest feasible budget in microseconds.
    """

    code = "FAILED_PRECONDITION"
    reason = "BUDGET_INFEASIBLE"


class QualityUnavailable(RequestError):
    """No variant reaches the requested quality; the metadata holds `max_quality`."""

    code = "FAILED_PRECONDITION"
    reason = "QUALITY_UNAVAILABLE"


class Overloaded(RequestError):
    """The request is feasible on an idle server but not under the current load.

    Callers should retry after `retry_after_s` seconds.
    """

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The caller's token has reached its own limit, whatever the load of the server."""

    reason = "RATE_LIMITED"


class NonFiniteOutput(RequestError):
    """The model's output for this request is infinite or not a number.

    The input or the weights exceed the range of the number format that the model computes in.
    """

    code = "OUT_OF_RANGE"
    reason = "NON_FINITE_OUTPUT"


class ExpiredInQueue(RequestError):
    """The hard deadline passed while the request waited."""

    code = "DEADLINE_EXCEEDED"
    reason = "EXPIRED_IN_QUEUE"


class ExpiredInCompute(RequestError):
    """The hard deadline passed while the answer was computed."""

    code = "DEADLINE_EXCEEDED"
    reason = "EXPIRED_IN_COMPUTE"


class NotReady(RequestError):
    """The replica is still loading its models, or no replica serves."""

    code = "UNAVAILABLE"
    reason = "NOT_READY"


class Draining(RequestError):
    """The replica is going out of service and accepts no new requests."""

    code = "UNAVAILABLE"
    reason = "DRAINING"


class EngineRestarting(RequestError):
    """The process that computes has died and is being restarted."""

    code = "UNAVAILABLE"
    reason = "ENGINE_RESTARTING"


class Unsupported(RequestError):
    """The method is part of the protocol, but this server does not offer what it does."""

    code = "UNIMPLEMENTED"
    reason = "UNSUPPORTED"


class Unauthenticated(RequestError):
    """The call has no token, or one that the server does not know."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    """The token lacks the scope that the method requires."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class InternalError(RequestError):
    """A fault of the server; `error_id` in the metadata identifies the traceback in the log."""

    @classmethod
    def logged(cls, what: str, error: BaseException) -> InternalError:
        """Log `error` with its traceback under a new error id; return an error that has the id.

        `what` names the operation in the log; callers see only the id.
        """
        error_id = uuid.uuid4().hex[:12]
        log.error("error_id=%s %s", error_id, what, exc_info=error)
        return cls(f"internal error; error_id={error_id}", error_id=error_id)
