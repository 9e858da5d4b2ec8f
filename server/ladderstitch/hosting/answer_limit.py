"""The size of answers: what the outputs of some images take, and what a message may hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.errors import BundleError, InvalidArgument
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.networks.outputs import OutputEntry

RESERVED_BYTES = 64 << 10
"""Bytes of an answer that are left for everything but its outputs."""


@dataclass(frozen=True, slots=True)
class AnswerLimit:
    """The largest message that a server sends, `max_message_mb` in MiB."""

    max_message_mb: int

    @property
    def output_bytes(self) -> int:
        """The bytes of outputs that an answer may hold."""
        return (self.max_message_mb << 20) - RESERVED_BYTES

    def check_bundle(self, bundle: VisionBundle) -> None:
        """Raise `BundleError` if the outputs of one image do not fit into an answer."""
        needed = _bytes_of(bundle.manifest.outputs)
        if needed > self.output_bytes:
            raise BundleError(
                f"{bundle.path}: expected outputs of one image of at most {self.output_bytes} "
                f"bytes, got {needed}; raise max_message_mb ({self.max_message_mb}) of the server "
                "and of gateways in front of it"
            )

    def check_request(self, field: str, images: int, outputs: Sequence[OutputEntry]) -> None:
        """Raise `InvalidArgument` if the outputs of a request's images do not fit together."""
        each = _bytes_of(outputs)
        if images * each > self.output_bytes:
            raise InvalidArgument(
                f"{field}.shape",
                f"expected at most {self.output_bytes // each} inputs, whose outputs of {each} "
                f"bytes each fit into max_message_mb ({self.max_message_mb}), got {images}",
            )


def _bytes_of(outputs: Sequence[OutputEntry]) -> int:
    return sum(output.num_bytes for output in outputs)
