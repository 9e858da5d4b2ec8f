"""The rehearsal of a replica: it answers real requests, which are not counted."""

from __future__ import annotations

import logging

import pytest

from ladderstitch.api import rehearsal
from ladderstitch.api.listener import ListenerConfig
from ladderstitch.api.rehearsal import REHEARSALS, rehearse
from ladderstitch.config import ServerConfig
from ladderstitch.replica.replica import Replica
from ladderstitch.text.bundle import TextBundle
from ladderstitch.vision.bundle import VisionBundle


@pytest.fixture
async def replica(tiny_bundle: VisionBundle) -> Replica:
    return Replica(ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0))


async def test_image_rehearsal_answers_every_kind_of_input(
    replica: Replica, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "SLOW_S", 300.0)
    await replica.start()
    model = replica.registry.vision_models["tiny"]
    statistics = model.scheduler.in_flight.statistics
    assert statistics.success.count == 0, "the rehearsal before the start is not counted"
    with caplog.at_level(logging.WARNING):
        await rehearse(model, replica.server.listener)  # not a twin, so that it is counted
    assert statistics.success.count == 3 * REHEARSALS  # JPEG, PNG and a tensor
    monkeypatch.setattr(rehearsal, "SLOW_S", 0.0)
    await rehearse(model, replica.server.listener)
    assert statistics.success.count == 3 * REHEARSALS + 3, "slow models answer one of each"
    assert statistics.fail.count == 0
    assert not caplog.records
    await replica.close()


async def test_rehearsal_leaves_no_counts_in_the_metrics(replica: Replica) -> None:
    await replica.start()
    for family in replica.metrics.registry.collect():
        for sample in family.samples:
            counts = sample.name in (
                "ladderstitch_requests_total",
                "ladderstitch_batch_size_count",
                "ladderstitch_queue_seconds_count",
            )
            assert not counts or sample.value == 0, sample
    await replica.close()


async def test_text_rehearsal_fills_no_prefix_cache(
    tiny_language_bundle: TextBundle, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig(
        bundle=tiny_language_bundle.path, port=0, metrics_port=0, max_model_len=128
    )
    replica = Replica(config)
    with caplog.at_level(logging.WARNING):
        await replica.start()
        (model,) = replica.registry.text_models.values()
        assert model.scheduler.statistics.success.count == 0
        assert not model.scheduler.block_manager.num_used
        await rehearse(model, replica.server.listener)
    assert model.scheduler.statistics.success.count >= 3
    assert model.scheduler.statistics.fail.count == 0
    assert not [record for record in caplog.records if "rehearsal" in record.getMessage()]
    await replica.close()


async def test_rehearsal_without_a_place_for_its_socket_is_logged(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await replica.start()
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent/folder")
    with caplog.at_level(logging.WARNING):
        await rehearse(replica.registry.vision_models["tiny"], ListenerConfig())
    assert "the rehearsal of model=tiny ended early" in caplog.text
    await replica.close()
