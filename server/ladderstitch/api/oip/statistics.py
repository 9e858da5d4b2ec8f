"""The statistics of a model in the form of `ModelStatistics`."""

from __future__ import annotations

from ladderstitch.hosting.registry import LoadedModel, VisionModel
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.telemetry.statistics import Statistics, Total


def describe_statistics(model: LoadedModel) -> pb.ModelStatistics:
    """Return the number and the total time of a model's requests and batches since its start.

    As with Triton, the durations of queue, input, inference and output count the successful
    requests, and `execution_count` is the sum of the counts of `batch_stats`. Inputs are not
    measured apart: 0 ns. The output has what is left of the total time.
    """
    counts = _statistics_of(model)
    answers, rest_s = counts.success, _rest_seconds(counts)
    return pb.ModelStatistics(
        name=model.name,
        version=model.version,
        last_inference=counts.last_inference_ms,
        inference_count=counts.inferences,
        execution_count=sum(total.count for total in counts.batches.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(answers),
            fail=_duration(counts.fail),
            queue=_duration(counts.queue),
            compute_input=_duration(Total(answers.count)),
            compute_infer=_duration(counts.compute),
            compute_output=_duration(Total(answers.count, rest_s)),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=batch_size,
                compute_input=_duration(Total(total.count)),
                compute_infer=_duration(total),
                compute_output=_duration(Total(total.count)),
            )
            for batch_size, total in sorted(counts.batches.items())
        ],
    )


def _statistics_of(model: LoadedModel) -> Statistics:
    if isinstance(model, VisionModel):
        return model.scheduler.in_flight.statistics
    return model.scheduler.statistics


def _rest_seconds(counts: Statistics) -> float:
    return max(0.0, counts.success.seconds - counts.queue.seconds - counts.compute.seconds)


def _duration(total: Total) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=total.count, ns=round(1e9 * total.seconds))
