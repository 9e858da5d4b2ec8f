"""How a hosted model describes itself in the Open Inference Protocol."""

from __future__ import annotations

import json

from ladderstitch.api.oip.inputs import INPUT
from ladderstitch.hosting.registry import VisionModel
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import model_config_pb2
from ladderstitch.vision.scheduler.in_flight import Total

PLATFORM = "ladderstitch"


def metadata(model: VisionModel) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    manifest = model.bundle.manifest
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[model.version],
        platform=PLATFORM,
        inputs=[tensor(name=INPUT, datatype="FP32", shape=[-1, *model.reader.shape])],
        outputs=[tensor(name="logits", datatype="FP32", shape=[-1, len(manifest.labels)])],
        properties={
            "labels": json.dumps(manifest.labels),
            "input_datatypes": "FP32 preprocessed [N,C,H,W]; UINT8 pixels [N,C,H,W]; "
            "BYTES PNG or JPEG files [N]",
            "outputs_on_demand": "probabilities, labels",
            "mean": json.dumps(manifest.preprocessing.mean),
            "std": json.dumps(manifest.preprocessing.std),
            "variants": str(len(model.variants)),
        },
    )


def config(model: VisionModel) -> model_config_pb2.ModelConfig:
    kinds = model_config_pb2.DataType
    classes = len(model.bundle.manifest.labels)
    return model_config_pb2.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=model.scheduler.latency.view.max_batch_size,
        input=[
            model_config_pb2.ModelInput(
                name=INPUT, data_type=kinds.TYPE_FP32, dims=model.reader.shape
            )
        ],
        output=[
            model_config_pb2.ModelOutput(name="logits", data_type=kinds.TYPE_FP32, dims=[classes])
        ],
        dynamic_batching=model_config_pb2.ModelDynamicBatching(),
    )


def statistics(model: VisionModel) -> pb.ModelStatistics:
    counts = model.scheduler.statistics
    return pb.ModelStatistics(
        name=model.name,
        version=model.version,
        last_inference=counts.last_inference_ms,
        inference_count=counts.inferences,
        execution_count=sum(total.count for total in counts.batches.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(counts.success),
            fail=_duration(counts.fail),
            queue=_duration(counts.queue),
            compute_infer=_duration(counts.compute),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=rows, compute_infer=_duration(total))
            for rows, total in sorted(counts.batches.items())
        ],
    )


def _duration(total: Total) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=total.count, ns=round(1e9 * total.seconds))
