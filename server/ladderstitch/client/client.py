"""The blocking client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from ladderstitch.addresses import DEFAULT_ADDRESS
from ladderstitch.client import calls
from ladderstitch.client.channel import PLAINTEXT, RETRY_POLICY, Credentials
from ladderstitch.client.generation import GenerateOptions, TextChunk, generate_request
from ladderstitch.client.messages import (
    Image,
    InferOptions,
    Prediction,
    RequestFailed,
)
from ladderstitch.v1 import admin_pb2, inference_pb2

Result = TypeVar("Result")


class Client(calls.BaseClient):
    """A blocking client: one channel, which threads may share.

    Every method raises `RequestFailed` if the call fails. `timeout_s` is the gRPC deadline of one
    call in seconds; if unset, that of the client applies.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        timeout_s: float = calls.DEFAULT_TIMEOUT_S,
        credentials: Credentials = PLAINTEXT,
        retry_policy: str | None = RETRY_POLICY,
    ) -> None:
        """Open a channel to HOST:PORT.

        `retry_policy` is a gRPC service config in JSON; None disables retries. Raises `ValueError`
        and `OSError` like `Credentials.channel_credentials`.
        """
        super().__init__(grpc, address, timeout_s, credentials, retry_policy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls in flight fail with CANCELLED."""
        self.channel.close()

    def predict(
        self, image: Image, *, timeout_s: float | None = None, **options: Unpack[InferOptions]
    ) -> Prediction:
        """Classify an image file or a batch of images; `infer_request` explains the options."""
        return self._call(calls.predict(image, **options), timeout_s)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[TextChunk]:
        """Yield the tokens of an answer as they arrive; `generate_request` explains the options."""
        request = generate_request(prompt, **options)
        try:
            for response in self.generation.Generate(
                request, timeout=timeout_s or self.timeout_s, metadata=self._metadata
            ):
                yield TextChunk.from_response(response)
        except grpc.RpcError as error:
            raise RequestFailed(error) from None

    def list_models(self) -> inference_pb2.ListModelsResponse:
        """Return the server's models, in order of their names."""
        return self._call(calls.list_models())

    def get_model(self, model: str = "") -> inference_pb2.GetModelResponse:
        """Return the description of a model; without a name, of the server's only one."""
        return self._call(calls.get_model(model))

    def check_budget(
        self, budget_s: float | None = None, min_quality: float | None = None, model: str = ""
    ) -> inference_pb2.CheckBudgetResponse:
        """Return the best variant within a budget, now and on an idle server."""
        return self._call(calls.check_budget(budget_s, min_quality, model))

    def get_scheduling(self, model: str = "") -> admin_pb2.Scheduling:
        """Return the scheduling settings of the replica, which apply to all its models.

        `model` must name one of its models if it is set. `unfit_models` of the reply lists the
        models that the settings do not fit, which keep their previous ones.
        """
        return self._call(calls.get_scheduling(model))

    def update_scheduling(
        self, model: str = "", **changes: Unpack[calls.SchedulingChanges]
    ) -> admin_pb2.Scheduling:
        """Change scheduling settings, e.g. `pinned_variant=3`; returns the active ones.

        The change applies to all models of the replica. `model` names the model whose variants and
        qualities the change is checked against; it may be unset if the server has only one model,
        or if the change names neither a variant nor a quality. Other models that the settings do
        not fit keep theirs: `unfit_models` of the reply lists them. `SchedulingChanges` explains
        the changes. Raises `ValueError` for an unknown policy.
        """
        return self._call(calls.update_scheduling(model, **changes))

    def load_model(self, bundle: str, *, timeout_s: float = calls.LOAD_TIMEOUT_S) -> str:
        """Load another model, or a new version of a loaded one; returns the model's name."""
        return self._call(calls.load_model(bundle), timeout_s)

    def unload_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Unload a model; returns when its accepted requests have ended."""
        self._call(calls.unload_model(model), timeout_s)

    def drain(self, announce_s: float = 0.0, *, timeout_s: float | None = None) -> bool:
        """Take the replica out of service; returns whether all accepted requests have ended.

        The replica reports NOT_SERVING for `announce_s` seconds before it rejects requests.
        """
        return self._call(calls.drain(announce_s), timeout_s)

    def health(self, service: str = "") -> str:
        """Return SERVING or NOT_SERVING of a service or model; without a name, of the replica."""
        return self._call(calls.health(service))

    def _call(self, call: calls.UnaryCall[Result], timeout_s: float | None = None) -> Result:
        try:
            return call.read(self._start(call, timeout_s))
        except grpc.RpcError as error:
            raise RequestFailed(error) from None
