"""The peers by name: what people would use instead, each doing equal work (see permuted.py)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .gpu_peers import DeepEp, Nccl, NixlEp
from .mpi import Mpi, MpiNoCma
from .native_permutes import NativePermutes, missing_library
from .permuted import ByTorch, PerChoice, process_group
from .systems import System
from .work import Shape


class Gloo(ByTorch):
    """torch.distributed's gloo, ``all_to_all_single``."""

    backend = "gloo"

    def __init__(self, shape: Shape, rank: int, store: Any) -> None:
        super().__init__(shape, rank)
        self.group = process_group("gloo", shape, rank, store)

    @staticmethod
    def missing() -> str:
        return (
            "" if dist.is_available() and dist.is_gloo_available() else "this torch has no gloo: install one that has"
        )


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


PEERS: dict[str, type[System]] = {
    "gloo": Gloo,
    "gloo-cpp": GlooCpp,
    "gloo-per-choice": GlooPerChoice,
    "mpi": Mpi,
    "mpi-cpp": MpiCpp,
    "mpi-no-cma": MpiNoCma,
    "nccl": Nccl,
    "deep-ep": DeepEp,
    "nixl-ep": NixlEp,
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
