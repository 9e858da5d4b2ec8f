"""Triton kernels of ladderstitch: ladder reductions, stitches, and the other ops of decoding.

The package imports torch and triton only. Ops of a single rank run their kernels on a GPU and in
the interpreter (TRITON_INTERPRET=1), and torch on a CPU. `reference` defines what each op computes.
Reductions between ranks need memory that all ranks map: `SharedMapping`, `StreamRanks` or
`PeerMemory`.
"""

from ladderstitch_kernels.comm.all_reduce import AllReduce
from ladderstitch_kernels.comm.split_phase import (
    Exchange,
    gemv_post,
    post,
    wait_add,
    wait_add_norm,
    wait_sum,
)
from ladderstitch_kernels.comm.symmetric import (
    PeerMemory,
    SharedMapping,
    StreamRanks,
    SymmetricMemory,
    SymmetricTensor,
)
from ladderstitch_kernels.ops.add_rms_norm import add_rms_norm
from ladderstitch_kernels.ops.decode_attention import paged_decode_attention
from ladderstitch_kernels.ops.rope_append import rope_append
from ladderstitch_kernels.ops.stitch_linear import stitch_linear, stitch_pending
from ladderstitch_kernels.ops.swiglu import swiglu

__all__ = [
    "AllReduce",
    "Exchange",
    "PeerMemory",
    "SharedMapping",
    "StreamRanks",
    "SymmetricMemory",
    "SymmetricTensor",
    "add_rms_norm",
    "gemv_post",
    "paged_decode_attention",
    "post",
    "rope_append",
    "stitch_linear",
    "stitch_pending",
    "swiglu",
    "wait_add",
    "wait_add_norm",
    "wait_sum",
]
