"""Everything that can go wrong, as one tree; each class bears its gRPC status and reason.

LadderstitchError
├── UserError                     wrong files or flags: the command line prints it and exits 2
│   ├── ConfigError
│   ├── DataError
│   └── BundleError
└── RequestError                  ends one request; `service` translates it to a status
    ├── BadInput                  INVALID_ARGUMENT     BAD_INPUT
    ├── ModelNotFound             NOT_FOUND            MODEL_NOT_FOUND
    ├── VariantNotFound            NOT_FOUND            VARIANT_NOT_FOUND
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
    ├── NotAllowed                PERMISSION_DENIED    NOT_ALLOWED
    └── InternalError             INTERNAL             INTERNAL
"""

from __future__ import annotations

import logging
import uuid
from typing import ClassVar

log = logging.getLogger(__name__)


class LadderstitchError(Exception):
    """Base of all errors that this package raises on purpose."""


class UserError(LadderstitchError):
    """Something that the person at the command line can mend."""


class ConfigError(UserError):
    """A configuration file or flag is wrong."""


class DataError(UserError):
    """A data file is missing or not what it should be."""


class BundleError(UserError):
    """A model bundle is incomplete, inconsistent or of another version."""


class RequestError(LadderstitchError):
    """Ends one request with a status; `metadata` travels in `google.rpc.ErrorInfo`."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.metadata = metadata


class InvalidArgument(RequestError):
    """The request is malformed: `field` is the path of the offending field."""

    code = "INVALID_ARGUMENT"
    reason = "BAD_INPUT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)
        self.field = field


class ModelNotFound(RequestError):
    code = "NOT_FOUND"
    reason = "MODEL_NOT_FOUND"


class VariantNotFound(RequestError):
    code = "NOT_FOUND"
    reason = "VARIANT_NOT_FOUND"


class BudgetInfeasible(RequestError):
    """The hard limit is below the fastest admissible variant alone (`min_feasible_us`)."""

    code = "FAILED_PRECONDITION"
    reason = "BUDGET_INFEASIBLE"


class QualityUnavailable(RequestError):
    """No variant reaches the quality asked for (`max_quality`)."""

    code = "FAILED_PRECONDITION"
    reason = "QUALITY_UNAVAILABLE"


class Overloaded(RequestError):
    """Feasible when idle, not now; worth another try after `retry_after_s`."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The caller's token has reached its own limit, whatever the load."""

    reason = "RATE_LIMITED"


class ExpiredInQueue(RequestError):
    code = "DEADLINE_EXCEEDED"
    reason = "EXPIRED_IN_QUEUE"


class ExpiredInCompute(RequestError):
    code = "DEADLINE_EXCEEDED"
    reason = "EXPIRED_IN_COMPUTE"


class NotReady(RequestError):
    code = "UNAVAILABLE"
    reason = "NOT_READY"


class Draining(RequestError):
    code = "UNAVAILABLE"
    reason = "DRAINING"


class EngineRestarting(RequestError):
    code = "UNAVAILABLE"
    reason = "ENGINE_RESTARTING"


class Unauthenticated(RequestError):
    """No token, or one that the server does not know."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    """The token lacks the scope that the method needs."""

    code = "PERMISSION_DENIED"
    reason = "NOT_ALLOWED"


class InternalError(RequestError):
    """A fault of the server; `error_id` in the metadata finds the traceback in the log."""

    @classmethod
    def logged(cls, what: str, error: BaseException) -> InternalError:
        """Log `error` with its traceback under a new error id, and return the error that bears it.

        `what` says for the log what was going on; callers see only the id.
        """
        error_id = uuid.uuid4().hex[:12]
        log.error("error_id=%s %s", error_id, what, exc_info=error)
        return cls(f"internal error; error_id={error_id}", error_id=error_id)
