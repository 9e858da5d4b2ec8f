"""The servers of the benchmark `peers`: a bare echo, NVIDIA Triton and ladderstitch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import numpy as np
from numpy.typing import NDArray

from ladderstitch.bundles import EMBEDDED
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.benchmarks.echo import METHOD
from ladderstitch_loadtest.load.closed_loop import LoopTarget
from ladderstitch_loadtest.servers.peer_packages import PeerError
from ladderstitch_loadtest.servers.processes import echo_server, ladderstitch_server
from ladderstitch_loadtest.servers.triton import triton_server
from ladderstitch_loadtest.servers.triton_repository import INPUT, write_repository

CHECKED_IMAGES = 8
TOLERANCE = 1e-3
"""Largest difference of two logits that counts as agreement."""
TIMEOUT_S = 60.0
INFER = "/inference.GRPCInferenceService/ModelInfer"

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Peer:
    """A running server; `model` is the one whose statistics it reports, and empty for the echo."""

    name: str
    target: LoopTarget
    model: str = ""


@contextmanager
def start_peers(packages: Path, variant: int) -> Iterator[tuple[list[Peer], float]]:
    """Run echo, Triton and ladderstitch with one network during the `with` block.

    Yields them, and the largest difference between the logits of Triton and ladderstitch.
    """
    bundle = VisionBundle.load(EMBEDDED)
    model, inputs = EMBEDDED.name, bundle.manifest.preprocessing
    shape = (CHECKED_IMAGES, inputs.channels, inputs.height, inputs.width)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    with ExitStack() as stack:
        repository = Path(stack.enter_context(TemporaryDirectory(prefix="ladderstitch-peers-")))
        write_repository(repository, model, bundle, variant)
        echo = stack.enter_context(echo_server())
        triton = stack.enter_context(triton_server(packages, repository, model))
        ours = stack.enter_context(ladderstitch_server("--no-ray", "--bundle", str(EMBEDDED)))
        largest = find_difference(
            [infer(triton, make_request(model, one)) for one in images],
            [infer(ours.address, make_request(model, one, variant)) for one in images],
        )
        pinned = make_request(model, images[0], variant)
        if call(echo, METHOD, pinned) != pinned:
            raise PeerError("echo: expected the request, got another answer")
        yield (
            [
                Peer("echo", LoopTarget(echo, METHOD, pinned)),
                _oip_peer("triton", triton, model, make_request(model, images[0])),
                _oip_peer("ladderstitch", ours.address, model, pinned),
            ],
            largest,
        )


def _oip_peer(name: str, address: str, model: str, message: bytes) -> Peer:
    return Peer(name, LoopTarget(address, INFER, message), model)


def make_request(model: str, image: NDArray[np.uint8], variant: int | None = None) -> bytes:
    """Return the serialised request for one image [C, H, W], pinned to `variant` if it is given."""
    request = oip.ModelInferRequest(model_name=model)
    request.inputs.add(name=INPUT, datatype="UINT8", shape=(1, *image.shape))
    request.raw_input_contents.append(image.tobytes())
    if variant is not None:
        request.parameters["variant_id"].int64_param = variant
    return request.SerializeToString()


def infer(address: str, message: bytes) -> Logits:
    """Return the logits [1, K] for a request; raises `PeerError` for an answer without them."""
    response = oip.ModelInferResponse.FromString(call(address, INFER, message))
    shape = list(response.outputs[0].shape)
    logits = np.frombuffer(response.raw_output_contents[0], "<f4")
    if logits.size != math.prod(shape):
        raise PeerError(f"logits of {address}: expected {shape}, got {logits.size} numbers")
    return logits.reshape(shape)


def find_difference(first: Sequence[Logits], second: Sequence[Logits]) -> float:
    """Return the largest difference between two networks' logits.

    Raises `PeerError` if it is more than 1e-3.
    """
    largest = float(max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)))
    if not largest <= TOLERANCE:
        raise PeerError(
            f"logits of Triton and ladderstitch: expected a difference of {TOLERANCE:g} at most, "
            f"got {largest:g}"
        )
    return largest


def call(address: str, method: str, message: bytes) -> bytes:
    """Return the reply to a message; raises `PeerError` if the call fails."""
    with grpc.insecure_channel(address) as channel:
        try:
            reply: bytes = channel.unary_unary(method)(message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise PeerError(f"{method} at {address}: {error.code()}: {error.details()}") from error
    return reply
