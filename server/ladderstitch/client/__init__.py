"""A typed client of `ladderstitch.v1`, blocking and asynchronous.

with Client("127.0.0.1:8001") as client:
    prediction = client.predict(png_bytes, budget_s=0.005)
    for chunk in client.generate("The capital of France is", max_tokens=8):
        print(chunk.text, end="")
"""

from ladderstitch.client.async_client import AsyncClient
from ladderstitch.client.calls import scheduling_settings
from ladderstitch.client.channel import RETRY_POLICY, Credentials
from ladderstitch.client.client import Client
from ladderstitch.client.generation import PromptToken, TextChunk, generate_request
from ladderstitch.client.messages import Image, Prediction, RequestFailed, infer_request

__all__ = [
    "RETRY_POLICY",
    "AsyncClient",
    "Client",
    "Credentials",
    "Image",
    "Prediction",
    "PromptToken",
    "RequestFailed",
    "TextChunk",
    "generate_request",
    "infer_request",
    "scheduling_settings",
]
