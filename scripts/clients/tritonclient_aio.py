# /// script
# dependencies = ["tritonclient[grpc]==2.73.0"]
#
# [tool.ladderstitch]
# package = "tritonclient"
# quick = true
# ///
"""NVIDIA's client, asyncio: concurrent images, and several texts on one stream."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator

import numpy as np
import tritonclient.grpc.aio as triton

IMAGES, TEXT = os.environ["LADDERSTITCH_IMAGE_MODEL"], os.environ["LADDERSTITCH_TEXT_MODEL"]


async def check_images(client: triton.InferenceServerClient) -> None:
    shape = [1, *(await client.get_model_metadata(IMAGES)).inputs[0].shape[1:]]
    images = np.random.default_rng(0).integers(0, 256, (20, *shape)).astype(np.uint8)

    async def infer(pixels: np.ndarray) -> np.ndarray:
        tensor = triton.InferInput("images", shape, "UINT8")
        tensor.set_data_from_numpy(pixels)
        options = {"variant_id": 0}  # the same network for all, whatever their batches
        return (await client.infer(IMAGES, [tensor], parameters=options)).as_numpy("logits")

    together = await asyncio.gather(*map(infer, images))
    alone = [await infer(pixels) for pixels in images[:3]]
    np.testing.assert_allclose(np.concatenate(together[:3]), np.concatenate(alone), atol=1e-3)
    print("ok concurrent infer")


async def check_texts(client: triton.InferenceServerClient) -> None:
    async def requests() -> AsyncIterator[dict[str, object]]:
        for number in range(3):
            tensor = triton.InferInput("text_input", [1], "BYTES")
            tensor.set_data_from_numpy(np.array([f"Text number {number}".encode()], object))
            yield {
                "model_name": TEXT,
                "inputs": [tensor],
                "request_id": str(number),
                "parameters": {"max_tokens": 4},
            }

    ended: Counter[str] = Counter()
    async for result, error in client.stream_infer(requests()):
        assert error is None, error
        response = result.get_response()
        ended[response.id] += response.parameters["triton_final_response"].bool_param
    assert ended == {"0": 1, "1": 1, "2": 1}
    print("ok stream of three texts")


async def main() -> None:
    async with triton.InferenceServerClient(os.environ["LADDERSTITCH_GRPC"]) as client:
        assert await client.is_server_ready()
        assert not await client.is_model_ready("no-such-model")
        print("ok state")
        await check_images(client)
        await check_texts(client)


if __name__ == "__main__":
    asyncio.run(main())
