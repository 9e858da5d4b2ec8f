"""Image models as messages: what they take and return, their variants, and outputs as tensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ladderstitch.hosting.registry import VisionModel
from ladderstitch.scheduling.profiles import Quality
from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.networks.outputs import NUMPY_TYPES

DATATYPES = {
    number: name.removeprefix("DATA_TYPE_")
    for name, number in pb.DataType.items()
    if number != pb.DATA_TYPE_UNSPECIFIED
}
DATATYPE_NUMBERS = {name: number for number, name in DATATYPES.items()}
OUTPUT_KINDS = {"scores": pb.OUTPUT_KIND_SCORES, "tensor": pb.OUTPUT_KIND_TENSOR}


def build_output(name: str, values: NDArray[np.generic]) -> pb.OutputTensor:
    """Return one output [B, ...] as a message."""
    types = {dtype: data_type for data_type, dtype in NUMPY_TYPES.items()}
    return pb.OutputTensor(
        name=name,
        data_type=DATATYPE_NUMBERS[types[values.dtype]],
        shape=values.shape,
        data=values.tobytes(),
    )


def describe_vision_model(model: VisionModel, ready: bool) -> pb.GetModelResponse:
    """Return the description of an image model, or of one that takes or returns tensors."""
    manifest, table, planner = model.bundle.manifest, model.bundle.quality, model.scheduler.planner
    assert table is not None, "a replica hosts only calibrated bundles"
    return pb.GetModelResponse(
        name=model.name,
        version=model.version,
        ready=ready,
        labels=manifest.labels,
        preprocessing=_describe_preprocessing(manifest.image_preprocessing),
        variants=[
            _describe_variant(model, variant, quality)
            for variant, quality in sorted(table.variants.items())
            if variant in model.variants
        ],
        frontier=planner.candidates.frontier,
        quality_metric=table.metric,
        quality_data=table.data,
        max_batch_size=planner.latency.view.max_batch_size,
        origin=manifest.origin,
        licence=manifest.licence,
        outputs=[
            pb.ModelOutput(
                name=output.name,
                data_type=DATATYPE_NUMBERS[output.data_type],
                shape=output.shape,
                kind=OUTPUT_KINDS[output.kind],
            )
            for output in manifest.outputs
        ],
        input_shape=model.reader.shape,
    )


def _describe_preprocessing(inputs: Preprocessing | None) -> pb.Preprocessing | None:
    if inputs is None:
        return None
    return pb.Preprocessing(
        channels=inputs.channels,
        height=inputs.height,
        width=inputs.width,
        mean=inputs.mean,
        std=inputs.std,
    )


def _describe_variant(model: VisionModel, variant: int, quality: Quality) -> pb.Variant:
    planner, stitch = model.scheduler.planner, model.variants[variant]
    latency = planner.latency.view
    return pb.Variant(
        id=variant,
        name=stitch.name,
        is_anchor=stitch.is_anchor,
        quality=quality.value,
        quality_low=quality.low,
        quality_high=quality.high,
        latency_us=round(1e6 * latency.expected(variant, 1)),
        planned_latency_us=round(1e6 * latency.seconds(variant, 1)),
        on_frontier=variant in planner.candidates.frontier,
    )
