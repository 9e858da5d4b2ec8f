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
    ├── ExpiredInQueue            DEADLINE_EXCEEDED    EXPIRED_IN_QUEUE
    ├── ExpiredInCompute          DEADLINE_EXCEEDED    EXPIRED_IN_COMPUTE
    ├── NotReady                  UNAVAILABLE          NOT_READY
    ├── Draining                  UNAVAILABLE          DRAINING
    ├── EngineRestarting          UNAVAILABLE          ENGINE_RESTARTING
    ├── Unauthenticated           UNAUTHENTICATED      UNAUTHENTICATED
    ├── PermissionDenied          PERMISSION_DENIED    PERMISSION_DENIED
    └── InternalError             INTERNAL             INTERNAL
"""

from __future__ import annotations

import logging
import uuid
from typing import ClassVar

log = logging.getLogger(__name__)


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
    sent to the caller in `google.rpc.ErrorInfo`.
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.metadata = metadata


class InvalidArgument(RequestError):
    """The request is malformed; `field` is the path of the offending field."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
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
