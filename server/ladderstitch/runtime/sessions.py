"""Sessions of ONNX Runtime on CPUs: threads, memory and the global pool of a process."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import onnxruntime

ERRORS_ONLY = 3
"""ONNX Runtime's log level."""
COPYING_OPTIMIZERS = ("ConstantFolding", "ConvBNFusion", "ConvMulFusion", "ConvAddFusion")
"""Optimisers that replace weights by others that are computed of them."""


def open_session(graph: str | bytes, threads: int) -> onnxruntime.InferenceSession:
    """Return the session of a graph, given by its file or as bytes, on `threads` threads.

    Its threads do not wait actively, so that they leave the processor to an event loop in the same
    process.
    """
    options = _options()
    options.intra_op_num_threads = threads
    # Threads that wait would take the processor from the event loop. ONNX Runtime's pool for
    # all sessions always spins: with other work on the cores, two threads take twice as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return _open(graph, options)


def open_sliced_session(
    graph: bytes, threads: int, values: Mapping[str, onnxruntime.OrtValue], *, copies: bool
) -> onnxruntime.InferenceSession:
    """Return the session of a graph whose tensors without data are these values.

    Without `copies`, the values stay where they are: what the graph computes of them alone is
    computed at each run, nothing is folded into them and nothing is packed. With `copies`, all of
    this is done once. The caller keeps the values' memory.
    """
    options = _options()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_external_initializers(list(values), list(values.values()))
    disabled: tuple[str, ...] = ()
    if not copies:
        # The first call binds the values while the graph is read, this one keeps them uncopied.
        for name, value in values.items():
            options.add_initializer(name, value)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.disable_prepacking", "1")
        disabled = COPYING_OPTIMIZERS
    return _open(graph, options, disabled)


def open_rank_session(graph: bytes, threads: int) -> onnxruntime.InferenceSession:
    """Return the session of a graph in a process that only computes, on `threads` threads.

    With more than one thread, all sessions share one pool, whose threads wait actively between
    operators: a step of a language model has hundreds, and waking a thread takes as long as one.
    """
    if threads == 1:
        return open_session(graph, threads)
    _start_global_pool(threads)
    options = _options()
    options.intra_op_num_threads = options.inter_op_num_threads = 0  # the pool has its own
    options.use_per_session_threads = False
    return _open(graph, options)


def _open(
    graph: str | bytes, options: onnxruntime.SessionOptions, disabled: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    """Return the session, which holds the weights once.

    ONNX Runtime's Python class keeps a graph of bytes as well, to open it again on other hardware.
    """
    session = onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )
    session._model_bytes = None
    return session


def _options() -> onnxruntime.SessionOptions:
    _register_arena()
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.use_env_allocators", "1")
    # weights outside of the arena, which would keep the memory of a model that is unloaded
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


@functools.cache
def _start_global_pool(threads: int) -> None:
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


@functools.cache
def _register_arena() -> None:
    """Let all sessions of this process share one arena for activations.

    With an arena each, the 130 sessions of the published DeiT family take 0.5 times as much memory
    again as its weights; without arenas they take 1.4 times as long.
    """
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, None)
