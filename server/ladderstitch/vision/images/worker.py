"""The process that decodes images: reads the headers of one file after another and decodes it.

`DecoderPool` starts it as `python -m ladderstitch.vision.images.worker SOCKET CONFIG`. The process
ends when the socket closes, and on Linux when its parent dies, also in the middle of an image.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from dataclasses import asdict, dataclass
from io import BufferedRWPair

from PIL import Image

from ladderstitch.vision.images.decode import InputFormat, decode
from ladderstitch.vision.images.formats import ImageRejected, read_headers

REQUEST = struct.Struct("!QQ")
"""The largest cost that this worker decodes, and the number of bytes of the file that follows."""
REPLY = struct.Struct("!BQ")
"""The kind of a reply and the number of bytes that follow."""
READY, DECODED, REJECTED, COSTLY, FAILED = range(5)
"""What follows a reply: nothing, pixels, a reason, the cost in decimal digits, a traceback."""
BASE_MEMORY_BYTES, MEMORY_BYTES_PER_PIXEL = 512 << 20, 32
"""Address space of a worker without an image, and for each pixel of the largest image."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The input format, the limit of pixels, the priority and the parent of a worker."""

    target: InputFormat
    max_pixels: int
    niceness: int
    parent_pid: int

    def to_json(self) -> str:
        """Return the configuration as text, for a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerConfig:
        """Return the configuration from the text of `to_json`."""
        fields = json.loads(text)
        target = fields.pop("target")
        target["background"] = tuple(target["background"])
        return cls(target=InputFormat(**target), **fields)


def answer(data: bytes, max_cost: int, config: WorkerConfig) -> tuple[int, bytes]:
    """Return the kind and the content of the reply to one file."""
    try:
        image = read_headers(data, config.max_pixels)
        if image.cost > max_cost:
            return COSTLY, str(image.cost).encode()
        return DECODED, decode(image, config.target)
    except ImageRejected as error:
        return REJECTED, str(error).encode()
    except Exception:
        return FAILED, traceback.format_exc().encode(errors="replace")


def serve(stream: BufferedRWPair, config: WorkerConfig) -> None:
    """Reply to one file after another until the stream ends."""
    stream.write(REPLY.pack(READY, 0))
    stream.flush()
    while len(header := stream.read(REQUEST.size)) == REQUEST.size:
        max_cost, num_bytes = REQUEST.unpack(header)
        data = stream.read(num_bytes)
        if len(data) < num_bytes:
            return
        kind, content = answer(data, max_cost, config)
        stream.write(REPLY.pack(kind, len(content)))
        stream.write(content)
        stream.flush()


def confine(config: WorkerConfig) -> None:
    """Limit the memory and the priority of this process, and tie its life to its parent's.

    Raises `SystemExit` if the parent has died already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C drains the server, which needs workers
    os.nice(config.niceness)
    if not sys.platform.startswith("linux"):
        return
    limit = BASE_MEMORY_BYTES + MEMORY_BYTES_PER_PIXEL * config.max_pixels
    _, maximum = resource.getrlimit(resource.RLIMIT_AS)
    if maximum != resource.RLIM_INFINITY:
        limit = min(limit, maximum)
    resource.setrlimit(resource.RLIMIT_AS, (limit, maximum))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != config.parent_pid:
        raise SystemExit("the parent has died")


def main() -> None:
    """Run the worker with the arguments of the command line."""
    config = WorkerConfig.from_json(sys.argv[2])
    confine(config)
    Image.MAX_IMAGE_PIXELS = None  # `max_pixels` has been checked
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rwb") as stream:
        try:
            serve(stream, config)
        except (BrokenPipeError, ConnectionResetError):
            return  # the server has closed the socket


if __name__ == "__main__":
    main()
