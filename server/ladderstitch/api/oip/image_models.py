"""Metadata and configuration of image models over the Open Inference Protocol."""

from __future__ import annotations

import json

from ladderstitch.api.oip.images import input_name
from ladderstitch.api.oip.inputs import PLATFORM
from ladderstitch.hosting.registry import VisionModel
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import model_config_pb2

Shapes = list[tuple[str, str, tuple[int, ...]]]
"""Name, type and shape for one image, of each output."""


def _outputs_of(model: VisionModel) -> Shapes:
    manifest = model.bundle.manifest
    if manifest.outputs:
        return [(output.name, output.data_type, output.shape) for output in manifest.outputs]
    return [("logits", "FP32", (len(manifest.labels),))]


def describe_metadata(model: VisionModel) -> pb.ModelMetadataResponse:
    """Return the names, types and shapes of a model's inputs and outputs.

    The type of images is UINT8, of which any value is a valid pixel; they may be FP32 and BYTES,
    too.
    """
    tensor = pb.ModelMetadataResponse.TensorMetadata
    manifest = model.bundle.manifest
    properties = {
        "labels": json.dumps(manifest.labels),
        "input_datatypes": f"FP32 [B,{','.join(map(str, model.reader.shape))}]",
        "non_finite_inputs": model.reader.non_finite,
        "variants": str(len(model.variants)),
    }
    if manifest.takes_images:
        properties |= {
            "input_datatypes": "UINT8 pixels [B,C,H,W]; FP32 preprocessed [B,C,H,W]; "
            "BYTES PNG or JPEG files [B]",
            "mean": json.dumps(manifest.preprocessing.mean),
            "std": json.dumps(manifest.preprocessing.std),
        }
    if not manifest.outputs:
        properties["outputs_on_demand"] = "probabilities, labels"
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[model.version],
        platform=PLATFORM,
        inputs=[
            tensor(
                name=input_name(model),
                datatype=model.reader.datatypes[0],
                shape=[-1, *model.reader.shape],
            )
        ],
        outputs=[
            tensor(name=name, datatype=datatype, shape=[-1, *shape])
            for name, datatype, shape in _outputs_of(model)
        ],
        properties=properties,
    )


def describe_config(model: VisionModel) -> model_config_pb2.ModelConfig:
    """Return the configuration of a model that clients of the protocol read."""
    kinds = model_config_pb2.DataType
    return model_config_pb2.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=model.scheduler.planner.latency.view.max_batch_size,
        input=[
            model_config_pb2.ModelInput(
                name=input_name(model),
                data_type=kinds.Value(f"TYPE_{model.reader.datatypes[0]}"),
                dims=model.reader.shape,
            )
        ],
        output=[
            model_config_pb2.ModelOutput(
                name=name, data_type=kinds.Value(f"TYPE_{datatype}"), dims=shape
            )
            for name, datatype, shape in _outputs_of(model)
        ],
        dynamic_batching=model_config_pb2.ModelDynamicBatching(),
    )
