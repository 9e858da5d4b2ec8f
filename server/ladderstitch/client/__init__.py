"""A small typed client of `ladderstitch.v1`, blocking and asynchronous.

with Client("127.0.0.1:8001") as client:
    prediction = client.predict(png_bytes, budget_s=0.005)
    for piece in client.generate("The capital of France is", max_tokens=8):
        print(piece.text, end="")
"""

from ladderstitch.client.access import Access
from ladderstitch.client.asynchronous import AsyncClient
from ladderstitch.client.blocking import Client
from ladderstitch.client.failure import RequestFailed
from ladderstitch.client.prediction import Image, Prediction, infer_request
from ladderstitch.client.retries import RETRY_POLICY
from ladderstitch.client.text import TextPiece, generate_request

__all__ = [
    "RETRY_POLICY",
    "Access",
    "AsyncClient",
    "Client",
    "Image",
    "Prediction",
    "RequestFailed",
    "TextPiece",
    "generate_request",
    "infer_request",
]
