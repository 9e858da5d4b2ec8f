"""The servers that `language-peers` compares, each at one precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ladderstitch.errors import ConfigError
from ladderstitch_loadtest.benchmarks.completions import STREAMS
from ladderstitch_loadtest.benchmarks.language_model_files import ModelFiles
from ladderstitch_loadtest.servers import hugging_face, llama_cpp, vllm_cpu
from ladderstitch_loadtest.servers.peer_environments import (
    LLAMA_CPP_REQUIREMENTS,
    TRANSFORMERS,
    VLLM,
    Requirements,
    installed_python,
)
from ladderstitch_loadtest.servers.peer_packages import PeerError
from ladderstitch_loadtest.servers.processes import OPENAI_URL, ladderstitch_server, port_server

LADDERSTITCH = "ladderstitch"
UNQUANTISED = "standard"
"""The path whose weights have the `dtype` of the server."""
FLOAT32, BFLOAT16 = "float32", "bfloat16"
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""Flags of processors that multiply bfloat16 numbers; others convert each of them."""


class Contender(Protocol):
    """A server at one precision; those of one precision are compared with each other."""

    @property
    def name(self) -> str:
        """The name of the server."""

    @property
    def precision(self) -> str:
        """The number format of the weights."""

    @property
    def batched(self) -> bool:
        """Whether eight streams are one request of eight prompts."""

    def server(self, files: ModelFiles, threads: int) -> AbstractContextManager[str]:
        """Run the server during the `with` block; yield its HTTP address.

        Raises a `UserError` if it cannot be installed or started.
        """


@dataclass(frozen=True, slots=True)
class Ladderstitch:
    """One path of ladderstitch's server, with a `dtype` for weights that are not quantised."""

    precision: str
    path: str
    dtype: str = FLOAT32
    name: str = LADDERSTITCH
    batched: bool = False

    @contextmanager
    def server(self, files: ModelFiles, threads: int) -> Iterator[str]:
        """Run `ladderstitch serve` during the `with` block; yield its HTTP address."""
        flags = ["--no-ray", "--model", files.name, "--path", self.path, "--http-port", "0"]
        flags += ["--threads", str(threads), "--dtype", self.dtype]
        with ladderstitch_server(*flags) as server:
            found = OPENAI_URL.search(server.ready_line)
            if found is None:
                raise PeerError(f"expected an HTTP address in {server.ready_line!r}")
            yield found[1]


@dataclass(frozen=True, slots=True)
class Peer:
    """A server in an environment of its own.

    `program` is a file whose arguments are the model, the number of threads, that of streams, and
    the precision. The model is a GGUF file if `reads_gguf`, or a folder in the Hugging Face layout.
    """

    name: str
    precision: str
    program: str
    requirements: Requirements
    reads_gguf: bool = False
    batched: bool = False

    @contextmanager
    def server(self, files: ModelFiles, threads: int) -> Iterator[str]:
        """Create the environment if needed and run the program; yield its HTTP address."""
        python = installed_python(self.requirements)
        model = files.gguf() if self.reads_gguf else files.folder
        arguments = (str(model), str(threads), str(STREAMS), self.precision)
        with port_server([str(python), "-I", self.program, *arguments]) as address:
            yield address


def make_contenders(
    path: str, precisions: Sequence[str], peers: Sequence[str] | None = None
) -> list[Contender]:
    """Return the servers: `path` and llama.cpp, and all others at each of the precisions.

    `peers` are the names of the peers to include; unset: all. Raises `ConfigError` for an unknown
    one.
    """
    all_peers = [Peer("llama.cpp", path, llama_cpp.__file__, LLAMA_CPP_REQUIREMENTS, True)]
    for dtype in precisions:
        program = hugging_face.__file__
        all_peers += [
            Peer("transformers", dtype, program, TRANSFORMERS, batched=True),
            Peer("vllm", dtype, vllm_cpu.__file__, VLLM),
        ]
    names = {peer.name: None for peer in all_peers}
    if unknown := set(peers or ()) - set(names):
        raise ConfigError(f"peers: expected some of {list(names)}, got {sorted(unknown)}")
    ours = [Ladderstitch(path, path)]
    ours += [Ladderstitch(dtype, UNQUANTISED, dtype) for dtype in precisions]
    return [*ours, *(peer for peer in all_peers if peers is None or peer.name in peers)]


def find_precisions(cpu_info: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return the unquantised precisions to compare on the processor that the file describes."""
    try:
        return parse_precisions(cpu_info.read_text())
    except OSError:
        return [FLOAT32]


def parse_precisions(cpu_info: str) -> list[str]:
    """Return float32, and bfloat16 if the processor multiplies it, by its flags."""
    flags = {
        flag
        for line in cpu_info.splitlines()
        if line.startswith("flags")
        for flag in line.partition(":")[2].split()
    }
    return [FLOAT32, BFLOAT16] if flags & BFLOAT16_FLAGS else [FLOAT32]
