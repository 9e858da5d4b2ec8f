"""The communicator of a rank, made by the kind that its group has chosen."""

from __future__ import annotations

import socket

import torch

from ladderstitch.text.comm.base import (
    CommSpec,
    Communicator,
    NcclSpec,
    SharedMemorySpec,
    SingleRankCommunicator,
    SingleSpec,
    SymmetricSpec,
    TcpSpec,
)
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.model.shard import Shard


def create_communicator(
    spec: CommSpec, config: RankConfig, shard: Shard, listener: socket.socket
) -> Communicator:
    """Return this rank's communicator, connected to all peers.

    Raises `ConfigError` if this machine does not support the kind, `PeerLost` if a peer cannot be
    reached.
    """
    match spec:
        case SharedMemorySpec():
            from ladderstitch.text.comm.shared_memory import EmulatedLink, SharedMemoryCommunicator

            link = EmulatedLink(spec.latency_s, spec.bytes_per_s or float("inf"))
            return SharedMemoryCommunicator(
                spec.path, shard.rank, shard.ranks, spec.slot_bytes, link
            )
        case TcpSpec():
            from ladderstitch.text.comm.tcp import TcpCommunicator

            return TcpCommunicator(listener, shard.rank, spec.addresses, spec.secret.encode())
        case NcclSpec():
            from ladderstitch.text.comm.nccl import NcclCommunicator

            if shard.rank == 0:
                listener.close()  # NCCL's store listens on this address
            return NcclCommunicator(spec.store, shard.rank, shard.ranks)
        case SymmetricSpec():
            from ladderstitch.text.comm.symmetric import (
                SymmetricCommunicator,
                open_symmetric_memory,
            )

            if shard.rank == 0:
                listener.close()
            device = torch.device(config.device)
            memory = open_symmetric_memory(spec.path, spec.store, shard.rank, shard.ranks, device)
            rows, width = config.max_batched_tokens, config.family.width
            return SymmetricCommunicator(memory, spec.path, rows, width, config.torch_dtype, device)
        case SingleSpec():
            return SingleRankCommunicator()
