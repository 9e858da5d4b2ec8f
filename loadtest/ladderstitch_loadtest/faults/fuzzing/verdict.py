"""The verdict on an answer: accepted and consistent, a refusal of the allowed kind, or wrong."""

from __future__ import annotations

from ladderstitch_loadtest.faults.fuzzing.cases import Answer, Case, Protocol
from ladderstitch_loadtest.faults.fuzzing.http_answers import check_error_body, is_json
from ladderstitch_loadtest.faults.fuzzing.rpc_answers import parse

REFUSALS = {
    "INVALID_ARGUMENT": {"INVALID_ARGUMENT"},
    "NOT_FOUND": {"MODEL_NOT_FOUND", "VARIANT_NOT_FOUND"},
    "FAILED_PRECONDITION": {"BUDGET_INFEASIBLE", "QUALITY_UNAVAILABLE"},
    "RESOURCE_EXHAUSTED": {"OVERLOADED"},
    "DEADLINE_EXCEEDED": {"EXPIRED_IN_QUEUE", "EXPIRED_IN_COMPUTE"},
    "OUT_OF_RANGE": {"NON_FINITE_OUTPUT"},
    "UNAUTHENTICATED": {"UNAUTHENTICATED"},
}
"""The gRPC statuses with which a request may be refused, and the reasons of each."""
HEALTH = "/grpc.health."
UNKNOWN_METHOD = "unknown method"
"""The name of the entrance whose rpc does not exist."""
HARD_DEADLINE = "x-deadline-ms"


def judge(case: Case, answer: Answer) -> str:
    """Return what is wrong with an answer; empty: nothing."""
    if answer.status in ("hang", "reset"):
        return answer.status
    if case.entrance.protocol is Protocol.SOCKET:
        return _judge_socket(case, answer)
    if case.entrance.protocol is Protocol.HTTP:
        return _judge_http(case, answer)
    return _judge_rpc(case, answer)


def _judge_rpc(case: Case, answer: Answer) -> str:
    if answer.status == "cancelled":
        return "" if case.cancel_after is not None else "cancelled by the server"
    if answer.status == "OK":
        if case.entrance.name == UNKNOWN_METHOD:
            return "expected UNIMPLEMENTED, got OK"
        is_stream = case.entrance.protocol is Protocol.BIDIRECTIONAL  # whose check knows more
        if not is_stream and parse(case.entrance.request_type, case.messages[0]) is None:
            return "accepted, though a message cannot be parsed"
        return case.entrance.check(case, answer)
    if case.entrance.method.startswith(HEALTH) and answer.status == "NOT_FOUND":
        return ""  # of the standard service, which sends no details
    if not answer.message:
        return f"{answer.status} without details"
    if answer.status == "DEADLINE_EXCEEDED" and case.deadline_s is not None:
        return ""  # the caller's own clock may end the call
    if case.entrance.name == UNKNOWN_METHOD:
        return "" if answer.status == "UNIMPLEMENTED" else f"got {_describe(answer)}"
    allowed = REFUSALS.get(answer.status, set())
    return "" if answer.reason in allowed else f"got {_describe(answer)}"


def _judge_http(case: Case, answer: Answer) -> str:
    if answer.status == "closed":
        return "closed without a response"
    if answer.status == "200":
        if not is_json(case.messages[0]):
            return "accepted, though the body is no JSON"
        return case.entrance.check(case, answer)
    has_deadline = any(key == HARD_DEADLINE for key, _ in case.headers)
    if answer.status == "504" and has_deadline:
        return check_error_body(answer)
    if not answer.status.startswith("4"):
        return f"got {_describe(answer)}"
    return check_error_body(answer)


def _judge_socket(case: Case, answer: Answer) -> str:
    """Judge the answer to bytes that may be no request of HTTP.

    The server may close the connection, wait for more, or refuse in plain text before it knows
    what is asked for.
    """
    if answer.status in ("closed", "incomplete", "200"):
        return ""
    if not answer.status.startswith("4"):
        return f"got {_describe(answer)}"
    if case.messages[0].startswith(b"HEAD "):
        return ""  # such a response has no body
    if answer.headers.get("content-type", "").startswith("application/json"):
        return check_error_body(answer)
    return "" if any(answer.body) else f"{answer.status} without a body"


def _describe(answer: Answer) -> str:
    is_http = answer.status.isdecimal()
    body = b"".join(answer.body)[:120].decode(errors="replace") if is_http else ""
    return f"{answer.status} {answer.reason} {answer.message[:200]} {body}".rstrip()
