"""Questions that a gateway answers from all of its replicas."""

from __future__ import annotations

import grpc
import pytest

from ladderstitch.gateway.merged_queries import OIP
from ladderstitch.oip import grpc_service_pb2 as pb
from tests.support.fake_replicas import Answer, Context, FakeReplica, StartGateway

STATISTICS, INDEX = f"{OIP}ModelStatistics", f"{OIP}RepositoryIndex"
Entry = pb.RepositoryIndexResponse.ModelIndex


def answer_with(message: pb.ModelStatisticsResponse | pb.RepositoryIndexResponse) -> Answer:
    async def answer(request: bytes, context: Context) -> bytes:
        return message.SerializeToString()

    return answer


def statistics(name: str, count: int, batches: dict[int, int]) -> pb.ModelStatistics:
    """Return statistics in which every duration has `count` events of 10 ns."""

    def duration(n: int) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=n, ns=10 * n)

    return pb.ModelStatistics(
        name=name,
        version="1",
        last_inference=1000 + count,
        inference_count=count,
        execution_count=sum(batches.values()),
        inference_stats=pb.InferStatistics(success=duration(count), queue=duration(count)),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=size, compute_infer=duration(n))
            for size, n in batches.items()
        ],
    )


async def test_statistics_are_the_sums_over_all_replicas(start_gateway: StartGateway) -> None:
    replicas = [FakeReplica(f"r{n}") for n in range(3)]
    replicas[0].answers[STATISTICS] = answer_with(
        pb.ModelStatisticsResponse(model_stats=[statistics("tiny", 3, {1: 1, 2: 1})])
    )
    replicas[1].answers[STATISTICS] = answer_with(
        pb.ModelStatisticsResponse(
            model_stats=[statistics("tiny", 5, {1: 2, 4: 1}), statistics("text", 7, {1: 7})]
        )
    )
    replicas[2].fail(STATISTICS, grpc.StatusCode.NOT_FOUND)
    async with start_gateway(replicas) as running:
        reply = await running.channel.unary_unary(STATISTICS)(b"", timeout=300)
    text, tiny = pb.ModelStatisticsResponse.FromString(reply).model_stats
    assert text == statistics("text", 7, {1: 7})
    expected = statistics("tiny", 8, {1: 3, 2: 1, 4: 1})
    expected.last_inference = 1005
    assert tiny == expected


async def test_query_that_fails_everywhere_ends_with_the_first_status(
    start_gateway: StartGateway,
) -> None:
    async with start_gateway(2) as running:
        for replica in running.replicas:
            replica.fail(STATISTICS, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND: x")
        with pytest.raises(grpc.aio.AioRpcError, match="MODEL_NOT_FOUND: x") as failed:
            await running.channel.unary_unary(STATISTICS)(b"", timeout=300)
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND


async def test_index_lists_each_model_once(start_gateway: StartGateway) -> None:
    async with start_gateway(2) as running:
        first = [Entry(name="tiny", version="1", state="UNAVAILABLE")]
        second = [
            Entry(name="tiny", version="1", state="READY"),
            Entry(name="a", version="2", state="READY"),
        ]
        for replica, models in zip(running.replicas, (first, second), strict=True):
            reply = pb.RepositoryIndexResponse(models=models)
            replica.answers[INDEX] = answer_with(reply)
        reply = await running.channel.unary_unary(INDEX)(b"", timeout=300)
    found = pb.RepositoryIndexResponse.FromString(reply).models
    assert [(m.name, m.version, m.state) for m in found] == [
        ("a", "2", "READY"),
        ("tiny", "1", "READY"),
    ]
