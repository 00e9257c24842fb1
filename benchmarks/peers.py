"""The peers by name: what people would use instead, each doing equal work (see permuted.py)."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from .mpi import Mpi, MpiNoCma
from .native_permutes import NativePermutes, missing_library
from .permuted import PerChoice, Permuted
from .work import Shape

_TIMEOUT = datetime.timedelta(seconds=60)


class Gloo(Permuted):
    """torch.distributed's gloo, ``all_to_all_single``."""

    backend = "gloo"

    def __init__(self, shape: Shape, rank: int, store: Any) -> None:
        super().__init__(shape, rank)
        # By the loopback device: a name server may not know this host.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=shape.ranks, timeout=_TIMEOUT)

    @staticmethod
    def missing() -> str:
        return (
            "" if dist.is_available() and dist.is_gloo_available() else "this torch has no gloo: install one that has"
        )

    def gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        dist.all_gather_into_tensor(gathered, mine)

    def exchange(
        self, arrived: torch.Tensor, sent: torch.Tensor, recv_counts: list[int], send_counts: list[int]
    ) -> None:
        dist.all_to_all_single(arrived, sent, recv_counts, send_counts)

    def close(self) -> None:
        dist.destroy_process_group()


class GlooPerChoice(Gloo, PerChoice):
    """gloo, a row for each choice."""


class GlooCpp(NativePermutes, Gloo):
    """gloo between permutes in C++."""

    @staticmethod
    def missing() -> str:
        return Gloo.missing() or missing_library()


class MpiCpp(NativePermutes, Mpi):
    """OpenMPI between permutes in C++."""

    @staticmethod
    def missing() -> str:
        return Mpi.missing() or missing_library()


PEERS: dict[str, type[Permuted]] = {
    "gloo": Gloo,
    "gloo-cpp": GlooCpp,
    "gloo-per-choice": GlooPerChoice,
    "mpi": Mpi,
    "mpi-cpp": MpiCpp,
    "mpi-no-cma": MpiNoCma,
}


def chosen_peers(text: str) -> list[str]:
    """The peers named in ``text``; ``all`` is every one that this machine can run.

    Raises:
        ValueError: there is no such peer, or it cannot run here; says what to install.
    """
    if text == "all":
        return [name for name, peer in PEERS.items() if not peer.missing()]
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peers: there is no peer {name!r}; give some of {', '.join(PEERS)}")
        if PEERS[name].missing():
            raise ValueError(f"--peers: {name}: {PEERS[name].missing()}, or leave it out of --peers")
    return names
