"""`ladderstitch.v1.InferenceService` and the client, against a real server."""

from __future__ import annotations

import asyncio
import io

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from ladderstitch.client import AsyncClient, Client, RequestFailed
from ladderstitch.v1 import inference_pb2, inference_pb2_grpc
from ladderstitch.vision.bundle import VisionBundle
from tests.conftest import make_tiny_bundle
from tests.support.servers import RunningServer, picture, pixels


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> VisionBundle:
    """Return a bundle with the weights of the server, to compute expected answers with."""
    return make_tiny_bundle(tmp_path_factory.mktemp("same") / "tiny")


def expected_logits(bundle: VisionBundle, images: np.ndarray, variant: int) -> np.ndarray:
    """Return the logits of the module's forward pass, which the golden vectors verify."""
    with torch.inference_mode():
        inputs = torch.from_numpy((images.astype(np.float32) / 255 - 0.5) / 0.25)
        return bundle.load_model()(inputs, variant).numpy()


@pytest.mark.parametrize("variant", [0, 2, 7, 16])
def test_predict_pinned_variant_returns_its_logits(
    client: Client, bundle: VisionBundle, variant: int
) -> None:
    images = pixels(3)
    answer = client.predict(images, variant=variant)
    assert answer.variant == variant
    np.testing.assert_allclose(answer.logits, expected_logits(bundle, images, variant), atol=1e-5)
    best = answer.logits.argmax(1)
    labels = bundle.manifest.labels
    assert [classes[0][0] for classes in answer.all] == [labels[i] for i in best]
    shares = np.exp(answer.logits) / np.exp(answer.logits).sum(1, keepdims=True)
    assert [c[0][1] for c in answer.all] == pytest.approx(shares.max(1).tolist(), abs=1e-6)


def test_predict_file_and_tensors_of_one_image_agree(client: Client) -> None:
    file = picture((8, 8))
    as_pixels = np.asarray(Image.open(io.BytesIO(file)))[None, None]
    as_floats = ((as_pixels / 255 - 0.5) / 0.25).astype(np.float32)
    answers = [client.predict(image, variant=5).logits for image in (file, as_pixels, as_floats)]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-6)
    np.testing.assert_allclose(answers[0], answers[2], atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kind", "mode"),
    [
        ((40, 30), "PNG", "RGB"),
        ((300, 260), "JPEG", "RGB"),
        ((9, 9), "PNG", "RGBA"),
        ((8, 8), "PNG", "1"),
        ((16, 8), "PNG", "P"),
        ((8, 8), "PNG", "I;16"),
    ],
)
def test_predict_accepts_images_of_any_size_and_mode(
    client: Client, size: tuple[int, int], kind: str, mode: str
) -> None:
    assert np.isfinite(client.predict(picture(size, kind, mode)).logits).all()


def test_predict_returns_the_cost_of_the_answer(client: Client) -> None:
    answer = client.predict(pixels(2), budget_s=10.0)
    assert answer.budget_s == pytest.approx(10.0)
    assert answer.budget_met is True
    assert answer.quality_metric == "top-1 accuracy"
    assert answer.batch_size == 2
    assert 0 <= answer.queue_s < answer.total_s
    assert 0 < answer.compute_s < answer.total_s
    assert answer.quality == 0.66  # the best variant fits ten seconds


def test_predict_plans_for_the_earliest_deadline(server: RunningServer) -> None:
    source = inference_pb2.BudgetSource
    with grpc.insecure_channel(server.address) as channel:
        infer = inference_pb2_grpc.InferenceServiceStub(channel).Infer

        def predict(
            budget_us: int | None, metadata: str | None, timeout: float
        ) -> inference_pb2.Accounting:
            request = inference_pb2.InferRequest(
                encoded_image=picture(), latency_budget_us=budget_us, request_id="mine"
            )
            extra = (("x-latency-budget-ms", metadata),) if metadata else ()
            response = infer(request, timeout=timeout, metadata=extra)
            assert response.request_id == "mine"
            return response.accounting

        for budget_us, metadata, timeout, expected_s, expected in (
            (None, None, 20, 20, source.BUDGET_SOURCE_GRPC_DEADLINE),
            (3_000_000, None, 20, 3, source.BUDGET_SOURCE_FIELD),
            (3_000_000, "2500.5", 20, 2.5005, source.BUDGET_SOURCE_METADATA),
            (9_000_000, "9000", 5, 5, source.BUDGET_SOURCE_GRPC_DEADLINE),
        ):
            cost = predict(budget_us, metadata, timeout)
            assert cost.budget_source == expected
            assert cost.budget_us / 1e6 == pytest.approx(expected_s, abs=0.5)


def test_predict_counts_the_time_a_gateway_held_the_call(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        infer = inference_pb2_grpc.InferenceServiceStub(channel).Infer
        request = inference_pb2.InferRequest(
            encoded_image=picture(), latency_budget_us=3_000_000, request_id="mine"
        )
        cost = infer(
            request, timeout=20, metadata=(("x-ladderstitch-held-us", "5000000"),)
        ).accounting
        assert cost.total_us > 5_000_000
        assert (cost.budget_us, cost.budget_met) == (3_000_000, False)
        with pytest.raises(grpc.RpcError, match="x-ladderstitch-held-us: expected 0 to"):
            infer(request, timeout=20, metadata=(("x-ladderstitch-held-us", "-1"),))


def test_predict_soft_budget_missed_returns_a_late_answer(client: Client) -> None:
    answer = client.predict(pixels(), budget_s=1e-6)
    assert answer.budget_met is False


def test_predict_infeasible_hard_budget_names_the_smallest(client: Client) -> None:
    with pytest.raises(RequestFailed) as failed:
        client.predict(pixels(), budget_s=1e-5, hard=True)
    assert failed.value.code == grpc.StatusCode.FAILED_PRECONDITION
    assert failed.value.reason == "BUDGET_INFEASIBLE"
    assert failed.value.message.startswith("BUDGET_INFEASIBLE: ")
    smallest_s = int(failed.value.metadata["min_feasible_us"]) / 1e6
    assert client.check_budget(smallest_s * 1.5).HasField("idle")


def test_predict_minimum_quality_selects_or_rejects(client: Client) -> None:
    assert client.predict(pixels(), min_quality=0.655, budget_s=1e-6).quality == 0.66
    with pytest.raises(RequestFailed) as failed:
        client.predict(pixels(), min_quality=0.9)
    assert failed.value.reason == "QUALITY_UNAVAILABLE"
    assert float(failed.value.metadata["max_quality"]) == pytest.approx(0.66)


def test_get_model_describes_variants_and_frontier(client: Client, bundle: VisionBundle) -> None:
    (summary,) = client.list_models().models
    assert (summary.name, summary.version, summary.ready, summary.variants) == (
        "tiny",
        "1",
        True,
        17,
    )
    model = client.get_model("tiny")
    assert tuple(model.labels) == bundle.manifest.labels
    assert [variant.id for variant in model.variants] == list(range(17))
    described = {variant.id: variant for variant in model.variants}
    along = [described[i] for i in model.frontier]
    assert [s.quality for s in along] == sorted(s.quality for s in along)
    assert {s.id for s in model.variants if s.on_frontier} == set(model.frontier)
    assert all(s.planned_latency_us >= s.latency_us > 0 for s in model.variants)


def test_check_budget_larger_budget_offers_better_quality(client: Client) -> None:
    smallest = client.check_budget()
    assert 0 < smallest.smallest_budget_idle_us <= smallest.smallest_budget_now_us
    assert not client.check_budget(1e-6).HasField("now")
    offers = [client.check_budget(s).idle.quality for s in (0.02, 0.1, 1.0)]
    assert offers == sorted(offers)
    assert offers[-1] == pytest.approx(0.66)
    good = client.check_budget(None, 0.655)
    assert good.smallest_budget_idle_us >= smallest.smallest_budget_idle_us


async def test_predict_concurrent_callers_get_their_own_answers(
    server: RunningServer, bundle: VisionBundle
) -> None:
    images = [pixels(1 + i % 3, seed=i) for i in range(60)]
    async with AsyncClient(server.address) as client:
        answers = await asyncio.gather(*(client.predict(i, variant=9) for i in images))
        model = await client.get_model()
        check = await client.check_budget(1.0)
    for image, answer in zip(images, answers, strict=True):
        np.testing.assert_allclose(answer.logits, expected_logits(bundle, image, 9), atol=1e-5)
        assert answer.batch_size >= len(image)
    assert model.name == "tiny"
    assert check.idle.quality == pytest.approx(0.66)


async def test_predict_client_deadline_ends_the_call(server: RunningServer) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(RequestFailed) as late:
            await client.predict(pixels(), timeout_s=-1.0)  # passed, however fast the server
    assert late.value.code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_predict_array_of_another_type_raises_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="expected uint8 or float32, got float64"):
        client.predict(np.zeros((1, 1, 8, 8)))  # type: ignore[arg-type] # the error under test


def test_predict_without_a_server_fails_as_unavailable() -> None:
    with Client("127.0.0.1:9", retry_policy=None) as client, pytest.raises(RequestFailed) as failed:
        client.predict(pixels(), timeout_s=300)
    assert failed.value.code == grpc.StatusCode.UNAVAILABLE
    assert failed.value.reason == ""
