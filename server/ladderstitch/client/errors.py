"""How a failed call looks to a caller."""

from __future__ import annotations

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

DETAILS_KEY = "grpc-status-details-bin"


class RequestFailed(Exception):
    """A call ended with a status; `reason` is machine-readable, e.g. `BUDGET_INFEASIBLE`."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.violations: dict[str, str] = {}
        self.retry_after_s: float | None = None
        for key, value in error.trailing_metadata() or ():
            if key == DETAILS_KEY:
                self._read(Status.FromString(value))
        super().__init__(f"{self.code.name}: {self.message}")

    def _read(self, status: Status) -> None:
        info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
        for detail in status.details:
            if detail.Unpack(info):
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                self.violations = {v.field: v.description for v in bad.field_violations}
            elif detail.Unpack(retry):
                self.retry_after_s = retry.retry_delay.ToMicroseconds() / 1e6
