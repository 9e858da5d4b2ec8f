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
from ladderstitch.vision.bundle import Bundle
from tests.conftest import make_tiny_bundle
from tests.support.servers import RunningServer, picture, pixels


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same weights as the server's, to compute expected answers from."""
    return make_tiny_bundle(tmp_path_factory.mktemp("same") / "tiny")


def expected_logits(bundle: Bundle, images: np.ndarray, variant: int) -> np.ndarray:
    """By the module forward pass, which the golden vectors vouch for."""
    with torch.inference_mode():
        inputs = torch.from_numpy((images.astype(np.float32) / 255 - 0.5) / 0.25)
        return bundle.load_model()(inputs, variant).numpy()


@pytest.mark.parametrize("variant", [0, 2, 7, 16])
def test_a_pinned_stitch_answers_with_its_logits(
    client: Client, bundle: Bundle, variant: int
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


def test_tensors_and_files_of_the_same_picture_agree(client: Client) -> None:
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
def test_pictures_of_any_size_and_mode_are_taken(
    client: Client, size: tuple[int, int], kind: str, mode: str
) -> None:
    assert np.isfinite(client.predict(picture(size, kind, mode)).logits).all()


def test_an_answer_says_what_it_cost(client: Client) -> None:
    answer = client.predict(pixels(2), budget_s=10.0)
    assert answer.budget_s == pytest.approx(10.0)
    assert answer.budget_met is True
    assert answer.quality_metric == "top-1 accuracy"
    assert answer.batch_size == 2
    assert 0 <= answer.queue_s < answer.total_s
    assert 0 < answer.compute_s < answer.total_s
    assert answer.quality == 0.66  # the best: ten seconds are plenty


def test_the_smallest_deadline_is_planned_for_and_named(server: RunningServer) -> None:
    source = inference_pb2.BudgetSource
    with grpc.insecure_channel(server.address) as channel:
        infer = inference_pb2_grpc.InferenceServiceStub(channel).Infer

        def ask(
            budget_us: int | None, metadata: str | None, timeout: float
        ) -> inference_pb2.Accounting:
            request = inference_pb2.InferRequest(
                encoded_image=picture(), latency_budget_us=budget_us, request_id="mine"
            )
            extra = (("x-latency-budget-ms", metadata),) if metadata else ()
            response = infer(request, timeout=timeout, metadata=extra)
            assert response.request_id == "mine"
            return response.accounting

        for budget_us, metadata, timeout, wanted_s, wanted in (
            (None, None, 20, 20, source.BUDGET_SOURCE_GRPC_DEADLINE),
            (3_000_000, None, 20, 3, source.BUDGET_SOURCE_FIELD),
            (3_000_000, "2500.5", 20, 2.5005, source.BUDGET_SOURCE_METADATA),
            (9_000_000, "9000", 5, 5, source.BUDGET_SOURCE_GRPC_DEADLINE),
        ):
            cost = ask(budget_us, metadata, timeout)
            assert cost.budget_source == wanted
            assert cost.budget_us / 1e6 == pytest.approx(wanted_s, abs=0.5)


def test_time_that_a_gateway_held_a_call_counts(server: RunningServer) -> None:
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


def test_a_soft_budget_is_answered_late_and_says_so(client: Client) -> None:
    answer = client.predict(pixels(), budget_s=1e-6)
    assert answer.budget_met is False


def test_a_hard_budget_below_the_fastest_is_refused_with_the_smallest(client: Client) -> None:
    with pytest.raises(RequestFailed) as refused:
        client.predict(pixels(), budget_s=1e-5, hard=True)
    assert refused.value.code == grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.reason == "BUDGET_INFEASIBLE"
    assert refused.value.message.startswith("BUDGET_INFEASIBLE: ")
    smallest_s = int(refused.value.metadata["min_feasible_us"]) / 1e6
    assert client.check_budget(smallest_s * 1.5).HasField("idle")


def test_quality_floors(client: Client) -> None:
    assert client.predict(pixels(), min_quality=0.655, budget_s=1e-6).quality == 0.66
    with pytest.raises(RequestFailed) as refused:
        client.predict(pixels(), min_quality=0.9)
    assert refused.value.reason == "QUALITY_UNAVAILABLE"
    assert float(refused.value.metadata["max_quality"]) == pytest.approx(0.66)


def test_models_describe_themselves(client: Client, bundle: Bundle) -> None:
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


def test_check_budget_offers_better_for_more(client: Client) -> None:
    smallest = client.check_budget()
    assert 0 < smallest.smallest_budget_idle_us <= smallest.smallest_budget_now_us
    assert not client.check_budget(1e-6).HasField("now")
    offers = [client.check_budget(s).idle.quality for s in (0.02, 0.1, 1.0)]
    assert offers == sorted(offers)
    assert offers[-1] == pytest.approx(0.66)
    good = client.check_budget(None, 0.655)
    assert good.smallest_budget_idle_us >= smallest.smallest_budget_idle_us


async def test_many_callers_at_once_get_their_own_answers(
    server: RunningServer, bundle: Bundle
) -> None:
    images = [pixels(1 + i % 3, seed=i) for i in range(60)]
    async with AsyncClient(server.address) as client:
        answers = await asyncio.gather(*(client.predict(i, variant=9) for i in images))
        model = await client.get_model()
        check = await client.check_budget(1.0)
    for image, answer in zip(images, answers, strict=True):
        np.testing.assert_allclose(answer.logits, expected_logits(bundle, image, 9), atol=1e-5)
    assert max(answer.batch_size for answer in answers) > 3
    assert model.name == "tiny"
    assert check.idle.quality == pytest.approx(0.66)


async def test_a_client_deadline_ends_the_call(server: RunningServer) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(RequestFailed) as late:
            await client.predict(pixels(), timeout_s=1e-4)
    assert late.value.code in (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.FAILED_PRECONDITION,
    )


def test_an_array_of_another_type_is_refused_by_the_client(client: Client) -> None:
    with pytest.raises(TypeError, match="expected uint8 or float32, got float64"):
        client.predict(np.zeros((1, 1, 8, 8)))  # type: ignore[arg-type] # that is the point


def test_no_server_is_said_plainly() -> None:
    with Client("127.0.0.1:9", retries=None) as client, pytest.raises(RequestFailed) as failed:
        client.predict(pixels(), timeout_s=5)
    assert failed.value.code == grpc.StatusCode.UNAVAILABLE
    assert failed.value.reason == ""
