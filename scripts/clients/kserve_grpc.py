# /// script
# dependencies = ["kserve==0.21.0"]
#
# [tool.ladderstitch]
# package = "kserve"
# ///
"""KServe's client of the Open Inference Protocol over gRPC."""

from __future__ import annotations

import asyncio
import os

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

IMAGES = os.environ["LADDERSTITCH_IMAGE_MODEL"]


async def main() -> None:
    client = InferenceGRPCClient(os.environ["LADDERSTITCH_GRPC"])
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready(IMAGES)
    assert not await client.is_model_ready("no-such-model")
    print("ok state")
    for datatype, dtype in (("UINT8", np.uint8), ("FP32", np.float32)):
        values = np.zeros((2, 1, 28, 28), dtype)
        tensor = InferInput(name="images", shape=list(values.shape), datatype=datatype)
        tensor.set_data_from_numpy(values)
        answer = await client.infer(InferRequest(model_name=IMAGES, infer_inputs=[tensor]))
        logits = answer.outputs[0].as_numpy()
        assert answer.outputs[0].name == "logits"
        assert logits.shape[0] == 2
        assert np.isfinite(logits).all()
        print(f"ok infer {datatype}")
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
