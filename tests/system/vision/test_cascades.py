"""Cascades and audits of the embedded model, against a real server, by both protocols."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from ladderstitch.bundles import EMBEDDED, find_bundle
from ladderstitch.cli.app import app
from ladderstitch.client import Client, RequestFailed
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch.vision.bundle import VisionBundle
from tests.support.servers import RunningServer, start_server, stop_server

EXAMPLES = sorted(
    (Path(__file__).parents[3] / "examples" / "fashion-mnist" / "images").glob("*.png")
)
LONG_S = 60.0
GOOD = 0.94
"""Quality of the variants that a server chooses for a long budget, also on a busy machine."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of the embedded model that audits every answer."""
    log = tmp_path_factory.mktemp("embedded") / "log"
    running = start_server(find_bundle(str(EMBEDDED)), log, "--audit-share", "1")
    yield running
    assert stop_server(running) == 0


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    """A client of the server."""
    with Client(server.address) as made:
        yield made


@pytest.fixture(scope="module")
def bundle() -> VisionBundle:
    """The embedded bundle."""
    return VisionBundle.load(find_bundle(str(EMBEDDED)))


def softmax_maximum(logits: np.ndarray, temperature: float) -> float:
    """Return the confidence of one row of logits in float64."""
    powers = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return float(powers.max() / powers.sum())


@pytest.mark.parametrize("minimum", [0.5, 0.9, 0.9999])
def test_answers_are_sure_or_from_the_last_stage(
    client: Client, bundle: VisionBundle, minimum: float
) -> None:
    assert bundle.quality is not None
    temperatures = bundle.quality.cascade_set.temperatures
    for path in EXAMPLES:
        answer = client.predict(path.read_bytes(), min_confidence=minimum)
        assert answer.confidence is not None
        assert answer.stages[-1] == answer.variant
        assert answer.quality >= GOOD or answer.confidence >= minimum
        expected = softmax_maximum(answer.logits[0], temperatures[answer.variant])
        assert answer.confidence == pytest.approx(expected, abs=1e-4)
        alone = client.predict(path.read_bytes(), variant=answer.variant)
        np.testing.assert_allclose(answer.logits, alone.logits, atol=1e-3)
        assert alone.confidence is None


def test_lower_minimum_is_answered_by_cheaper_variants(client: Client) -> None:
    quality = {
        minimum: [
            client.predict(path.read_bytes(), min_confidence=minimum).quality for path in EXAMPLES
        ]
        for minimum in (0.1, 1.0)
    }
    assert max(quality[0.1]) < GOOD <= min(quality[1.0])


@pytest.mark.parametrize("minimum", [-0.1, 1.1, float("nan")])
def test_minimum_outside_0_to_1_is_rejected(client: Client, minimum: float) -> None:
    with pytest.raises(RequestFailed) as failed:
        client.predict(EXAMPLES[0].read_bytes(), min_confidence=minimum)
    assert "min_confidence" in failed.value.violations


def test_open_inference_protocol_has_the_same_option(server: RunningServer, client: Client) -> None:
    request = oip.ModelInferRequest(model_name="fashion-mnist")
    request.inputs.add(name="images", datatype="BYTES", shape=[1])
    file = EXAMPLES[0].read_bytes()
    request.raw_input_contents.append(len(file).to_bytes(4, "little") + file)
    request.parameters["min_confidence"].double_param = 0.5
    with grpc.insecure_channel(server.address) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        parameters = stub.ModelInfer(request, timeout=LONG_S).parameters
        native = client.predict(file, min_confidence=0.5)
        assert parameters["ladderstitch_stages"].string_param == str(native.variant)
        confidence = parameters["ladderstitch_confidence"].double_param
        assert confidence == pytest.approx(native.confidence, abs=1e-4)
        request.parameters["min_confidence"].double_param = 2.0
        with pytest.raises(grpc.RpcError, match="min_confidence: expected 0 to 1"):
            stub.ModelInfer(request, timeout=LONG_S)


def test_predict_prints_confidence_and_stages(server: RunningServer) -> None:
    command = ["predict", str(EXAMPLES[0]), "--min-confidence", "0.5"]
    done = CliRunner().invoke(app, [*command, "--address", server.address])
    assert done.exit_code == 0, done.output
    assert "confidence" in done.output
    assert "stages" in done.output


def read_metric(server: RunningServer, prefix: str) -> float:
    """Return the sum of all series whose names begin with a prefix."""
    text = urllib.request.urlopen(server.metrics, timeout=LONG_S).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(prefix)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_idle_server_audits_answers(server: RunningServer, client: Client) -> None:
    before = read_metric(server, "ladderstitch_audited_images_total")
    for path in EXAMPLES[:4]:
        client.predict(path.read_bytes(), variant=0)
    deadline = time.monotonic() + LONG_S
    while read_metric(server, "ladderstitch_audited_images_total") < before + 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert read_metric(server, 'ladderstitch_cascade_answers_total{end="sure"') > 0
