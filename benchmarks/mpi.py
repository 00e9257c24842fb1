"""OpenMPI as a peer: Alltoallv between the same permutes, with and without copies through the kernel (CMA)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from typing import Any

import torch

from .permuted import Permuted
from .work import Shape


class Mpi(Permuted):
    """``Alltoallv`` of OpenMPI through mpi4py; rows go from one process into the other in one copy (CMA)."""

    backend = "mpi"
    single_copy = "cma"  # of btl_vader_single_copy_mechanism

    def __init__(self, shape: Shape, rank: int, store: Any) -> None:
        super().__init__(shape, rank)
        from mpi4py import MPI

        self.mpi, self.group = MPI, MPI.COMM_WORLD
        self.row = MPI.BYTE.Create_contiguous(shape.row_bytes).Commit()

    @staticmethod
    def missing() -> str:
        if importlib.util.find_spec("mpi4py") is None:
            return "mpi4py is not installed: run `python -m pip install mpi4py`"
        if shutil.which("mpirun") is None:
            return "there is no mpirun: install OpenMPI (Debian: apt-get install openmpi-bin)"
        said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
        return (
            "" if "Open MPI" in said else "mpirun is not OpenMPI's, whose options this benchmark uses: install OpenMPI"
        )

    def gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        self.group.Allgather(mine.numpy(), gathered.numpy())

    def exchange(
        self, arrived: torch.Tensor, sent: torch.Tensor, recv_counts: list[int], send_counts: list[int]
    ) -> None:
        bytes_of_sent, bytes_of_arrived = (rows.view(torch.uint8).numpy() for rows in (sent, arrived))
        self.group.Alltoallv([bytes_of_sent, send_counts, self.row], [bytes_of_arrived, recv_counts, self.row])

    def close(self) -> None:
        self.row.Free()  # mpi4py finalizes when the process ends; a launcher's has other rounds of it to run


class MpiNoCma(Mpi):
    """The same through a shared segment: two copies, as where the kernel or a container forbids CMA."""

    single_copy = "none"
