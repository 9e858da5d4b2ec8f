"""Networks that return tensors or take no images, behind a real server and a gateway."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.cli import app
from ladderstitch.client import AsyncClient, Client, RequestFailed
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_pool import discover_replicas
from ladderstitch.importers.image_settings import WHOLE, ImageSettings
from ladderstitch.importers.onnx_bundle import import_networks
from ladderstitch.importers.onnx_networks import FamilyInfo
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch.v1 import inference_pb2 as pb
from tests.support.servers import RunningServer, start_server, stop_server
from tests.support.tensor_networks import (
    CLASSES,
    IMAGE,
    VIDEO,
    Embedder,
    Pooled,
    Segmenter,
    TwoOutputs,
    Video,
    Wide,
    random_inputs,
    run_file,
    write_tensor_network,
)

Stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub
KINDS = {
    "masks": Segmenter,
    "two": TwoOutputs,
    "tokens": Embedder,
    "vector": Pooled,
    "video": Video,
    "wide": Wide,
}
LABELLED = ("masks", "video")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of bundles of one network each, next to the ONNX files."""
    home = tmp_path_factory.mktemp("tensors")
    for name, kind in KINDS.items():
        path = write_tensor_network(home / f"{name}.onnx", kind, 8)
        labels = CLASSES if name in LABELLED else None
        outputs = "tensors" if name == "vector" else "auto"
        settings = ImageSettings(labels=labels, crop=WHOLE)
        info = FamilyInfo(name, settings=settings, outputs=outputs)  # type: ignore[arg-type]
        import_networks([path], info, home / name)
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[RunningServer]:
    """Start a server of all bundles, with messages of at most 8 MiB."""
    environment = {HOME_VARIABLE: str(home)}
    running = start_server(
        home / "masks", home / "log", "--max-message-mb", "8", environment=environment
    )
    with Client(running.address) as client:
        for name in KINDS:
            if name != "masks":
                assert client.load_model(name) == name
    yield running
    assert stop_server(running) == 0


def check(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compare all outputs with those of ONNX Runtime: names, order, types, shapes and values."""
    assert list(got) == list(expected)
    for name, values in expected.items():
        assert got[name].dtype == values.dtype
        assert got[name].shape == values.shape
        np.testing.assert_allclose(got[name], values, atol=1e-4)


@pytest.mark.parametrize("name", ["masks", "two", "tokens", "vector"])
def test_native_answers_equal_onnx_runtime(name: str, server: RunningServer, home: Path) -> None:
    images = random_inputs(3, IMAGE)
    with Client(server.address) as client:
        answer = client.predict(images, model=name)
        assert (answer.label, answer.all, answer.logits.shape) == ("", [], (0, 0))
        check(answer.outputs, run_file(home / f"{name}.onnx", images))
        assert answer.variant_name == name


async def test_batched_requests_get_their_own_rows(server: RunningServer, home: Path) -> None:
    inputs = [random_inputs(1 + seed % 3, IMAGE, seed) for seed in range(12)]
    async with AsyncClient(server.address) as client:
        calls = [client.predict(images, model="two") for images in inputs]
        answers = await asyncio.gather(*calls)
    for images, answer in zip(inputs, answers, strict=True):
        check(answer.outputs, run_file(home / "two.onnx", images))


def test_image_files_are_read_for_tensor_outputs(server: RunningServer, home: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with Client(server.address) as client:
        encoded = client.predict(file.getvalue(), model="masks")
        raw = client.predict(pixels.transpose(2, 0, 1)[None].copy(), model="masks")
    images = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    expected = run_file(home / "masks.onnx", images)
    check(raw.outputs, expected)
    check(encoded.outputs, expected)


def test_video_scores_are_classes(server: RunningServer, home: Path) -> None:
    videos = random_inputs(3, VIDEO)
    with Client(server.address) as client:
        answer = client.predict(videos, model="video")
        expected = run_file(home / "video.onnx", videos)["scores"]
        np.testing.assert_allclose(answer.logits, expected, atol=1e-4)
        assert answer.label == CLASSES[int(expected[0].argmax())]
        assert answer.outputs == {}


def test_models_describe_inputs_and_outputs(server: RunningServer) -> None:
    with Client(server.address) as client:
        two, masks, video = (client.get_model(name) for name in ("two", "masks", "video"))
    described = [(o.name, o.data_type, list(o.shape), o.kind) for o in two.outputs]
    assert described == [
        ("maps", pb.DATA_TYPE_FP32, [6, 8, 8], pb.OUTPUT_KIND_TENSOR),
        ("best", pb.DATA_TYPE_INT64, [8, 8], pb.OUTPUT_KIND_TENSOR),
        ("mean", pb.DATA_TYPE_FP32, [], pb.OUTPUT_KIND_TENSOR),
    ]
    assert (list(two.labels), list(two.input_shape)) == ([], list(IMAGE))
    assert [o.kind for o in masks.outputs] == [pb.OUTPUT_KIND_SCORES]
    assert list(masks.labels) == list(CLASSES)
    assert (list(video.input_shape), list(video.labels)) == (list(VIDEO), list(CLASSES))
    assert not video.HasField("preprocessing")
    assert not video.outputs
    with grpc.insecure_channel(server.address) as channel:
        stub = Stub(channel)
        found = stub.ModelMetadata(oip.ModelMetadataRequest(name="two"))
        config = stub.ModelConfig(oip.ModelConfigRequest(name="video")).config
    shapes = {output.name: (output.datatype, list(output.shape)) for output in found.outputs}
    assert shapes["best"] == ("INT64", [-1, 8, 8])
    assert shapes["mean"] == ("FP32", [-1])
    assert found.inputs[0].name == "images"
    assert (config.input[0].name, list(config.input[0].dims)) == ("video", list(VIDEO))
    assert config.output[0].name == "logits"


def oip_request(model: str, name: str, values: np.ndarray, *outputs: str) -> oip.ModelInferRequest:
    """Return a request with one raw float32 input."""
    request = oip.ModelInferRequest(model_name=model, raw_input_contents=[values.tobytes()])
    request.inputs.add(name=name, datatype="FP32", shape=values.shape)
    for output in outputs:
        request.outputs.add(name=output)
    return request


TYPES = {"FP32": np.float32, "INT64": np.int64}


def test_oip_returns_tensors_by_name(server: RunningServer, home: Path) -> None:
    images, videos = random_inputs(2, IMAGE), random_inputs(2, VIDEO)
    expected = run_file(home / "two.onnx", images)
    with grpc.insecure_channel(server.address) as channel:
        stub = Stub(channel)
        for asked in ((), ("mean", "maps")):
            answer = stub.ModelInfer(oip_request("two", "images", images, *asked))
            got = {
                output.name: np.frombuffer(raw, TYPES[output.datatype]).reshape(output.shape)
                for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
            }
            check(got, {name: expected[name] for name in asked or expected})
        (raw,) = stub.ModelInfer(oip_request("video", "video", videos)).raw_output_contents
    scores = run_file(home / "video.onnx", videos)["scores"]
    got_scores = np.frombuffer(raw, np.float32).reshape(2, 4)
    np.testing.assert_allclose(got_scores, scores, atol=1e-4)


def test_tritonclient_reads_tensors(server: RunningServer, home: Path, tmp_path: Path) -> None:
    images, videos = random_inputs(2, IMAGE), random_inputs(2, VIDEO)
    np.savez(tmp_path / "inputs.npz", images=images, video=videos)
    probe = Path(__file__).with_name("tritonclient_tensors_probe.py")
    files = [str(tmp_path / "inputs.npz"), str(tmp_path / "answers.npz")]
    command = [sys.executable, str(probe), server.address, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    expected = run_file(home / "two.onnx", images)
    wanted = {name: expected[name] for name in ("best", "maps")}
    wanted["logits"] = run_file(home / "video.onnx", videos)["scores"]
    with np.load(files[1]) as answers:
        check(dict(answers), wanted)


def test_oip_refuses_other_inputs_and_outputs(server: RunningServer) -> None:
    images, videos = random_inputs(1, IMAGE), random_inputs(1, VIDEO)
    encoded = oip.ModelInferRequest(model_name="video", raw_input_contents=[b"\1\0\0\0x"])
    encoded.inputs.add(name="video", datatype="BYTES", shape=[1])
    classified = oip_request("two", "images", images, "maps")
    classified.outputs[0].parameters["classification"].int64_param = 1
    wrong = [
        (oip_request("two", "images", images, "logits"), r"expected some of \['maps', 'best'"),
        (oip_request("video", "images", videos), "expected exactly one input named 'video'"),
        (
            oip_request("video", "video", videos[:, :, :2]),
            r"video.shape: expected \['N >= 1', 3, 4",
        ),
        (encoded, r"video: expected a tensor FP32 .* got an encoded image"),
        (classified, "classification: expected none for tensors"),
    ]
    with grpc.insecure_channel(server.address) as channel:
        for request, message in wrong:
            with pytest.raises(grpc.RpcError, match=message):
                Stub(channel).ModelInfer(request)
        assert Stub(channel).ModelInfer(oip_request("two", "images", images)).outputs


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"\x89PNG", "encoded_image: expected a tensor FP32"),
        (np.zeros((1, *VIDEO), np.uint8), "tensor.datatype: expected FP32, got 'UINT8'"),
        (np.zeros((1, 3, 4, 8, 9), np.float32), r"tensor.shape: expected \['N >= 1', 3, 4, 8, 8\]"),
        (np.zeros((3, 4, 8, 8), np.float32), "tensor.shape: expected"),
        (np.full((1, *VIDEO), np.nan, np.float32), "tensor.data: expected finite"),
    ],
)
def test_wrong_inputs_of_tensor_models_are_refused(
    image: bytes | np.ndarray, message: str, server: RunningServer
) -> None:
    with Client(server.address) as client:
        with pytest.raises(RequestFailed, match=message) as failed:
            client.predict(image, model="video")
        assert failed.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_answers_are_limited_by_size(server: RunningServer, home: Path) -> None:
    images = random_inputs(8, IMAGE)
    with Client(server.address) as client:
        answer = client.predict(images[:7], model="wide")
        check(answer.outputs, run_file(home / "wide.onnx", images[:7]))
        message = r"tensor.shape: expected at most 7 inputs, .* max_message_mb \(8\), got 8"
        with pytest.raises(RequestFailed, match=message):
            client.predict(images, model="wide")


def test_rows_that_are_not_finite_fail_alone(server: RunningServer, home: Path) -> None:
    images = random_inputs(1, IMAGE)
    huge = np.sign(images) * np.float32(3e38)
    with Client(server.address) as client:
        with pytest.raises(RequestFailed, match="NaN or infinity for 1 of 2 images") as failed:
            client.predict(np.concatenate([images, huge]), model="two")
        assert failed.value.reason == "NON_FINITE_OUTPUT"
        check(client.predict(images, model="two").outputs, run_file(home / "two.onnx", images))


def test_gateway_passes_tensors_on(server: RunningServer, home: Path) -> None:
    images, videos = random_inputs(2, IMAGE), random_inputs(1, VIDEO)

    async def call() -> None:
        config = GatewayConfig(
            port=0, metrics_port=0, drain_announce_s=0, replicas=(server.address,)
        )
        gateway = Gateway(config, discover_replicas(config.replicas))
        await gateway.start()
        async with asyncio.timeout(300):
            await gateway.wait_until_serving()
        async with AsyncClient(f"127.0.0.1:{gateway.port}") as client:
            answer = await client.predict(images, model="two")
            check(answer.outputs, run_file(home / "two.onnx", images))
            large = await client.predict(random_inputs(7, IMAGE), model="wide")
            assert large.outputs["wide"].shape == (7, 8, 192, 192)
            classes = await client.predict(videos, model="video")
            assert classes.logits.shape == (1, 4)
            with pytest.raises(RequestFailed, match="encoded_image: expected a tensor"):
                await client.predict(b"x", model="video")
        await gateway.stop()

    asyncio.run(call())


def test_command_line_prints_and_writes_tensors(
    server: RunningServer, home: Path, tmp_path: Path
) -> None:
    images = random_inputs(3, IMAGE)
    np.save(tmp_path / "one.npy", images[:1])
    np.save(tmp_path / "two.npy", images[1:])
    files = [str(tmp_path / "one.npy"), str(tmp_path / "two.npy")]
    options = ["--model", "two", "--address", server.address]
    output = ["--output", str(tmp_path / "out.npz")]
    result = CliRunner().invoke(app, ["predict", *files, *options, *output])
    assert result.exit_code == 0, result.output
    names, *rows = (line.split("\t") for line in result.stdout.splitlines())
    fields = [dict(zip(names, row, strict=True)) for row in rows if row[1:2] == ["maps"]]
    assert json.loads(fields[1]["shape"]) == [2, 6, 8, 8]
    expected = run_file(home / "two.onnx", images)
    with np.load(tmp_path / "out.npz") as written:
        check(dict(written), expected)
    assert float(fields[0]["max"]) == pytest.approx(float(expected["maps"][:1].max()), rel=1e-3)
    (tmp_path / "bad.npy").write_bytes(b"not numpy")
    refused = CliRunner().invoke(app, ["predict", str(tmp_path / "bad.npy"), *options])
    assert refused.exit_code == 2
    assert "bad.npy" in refused.output
