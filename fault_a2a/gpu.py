"""A rank on a GPU before it runs: which device, its machine code, and how peers come by its window."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fault_a2a._core import core
from fault_a2a.errors import ConstructError

if TYPE_CHECKING:
    from fault_a2a.config import Config
    from fault_a2a.group import Group

_TWIN = "FAULT_A2A_TWIN_DRIVER"  # test build: the CUDA driver is one whose device is this host


def has_twin() -> bool:
    return bool(core.has_hooks) and _TWIN in os.environ


def device_type_of(backend: str) -> str:
    """Where tensors of this backend lie: "cuda" or "cpu"."""
    return "cuda" if backend == "cuda" and not has_twin() else "cpu"


def device_of(backend: str) -> torch.device:
    """The same with its number: the device that is torch's current one when the buffer is constructed.

    Raises:
        ConstructError: torch finds no GPU.
    """
    if device_type_of(backend) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConstructError(
            f'backend: "cuda" needs a GPU, and torch {torch.__version__} finds none; `fault-a2a doctor` says why, '
            'and backend="cpu" runs anywhere'
        )
    return torch.device("cuda", torch.cuda.current_device())


def gpu_fields(config: Config) -> dict[str, Any]:
    """What the native core needs of a GPU: compiles the kernels for it, seconds the first time."""
    if has_twin():
        return {"device": 0, "cubins": [b"twin"]}
    from fault_a2a.kernel_compiler import compile_kernels

    device = device_of(config.backend)
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    found = compile_kernels(arch, str(config.dtype).removeprefix("torch."))
    return {"device": device.index, "cubins": [cubin.read_bytes() for cubin, _ in found]}


def hand_over_windows(endpoint: Any, group: Group, token: str, deadline: float) -> None:
    """Gives every peer the descriptor of its partition of my window, and opens mine in theirs. Collective, bounded.

    Raises:
        ConstructError: a peer did not come, or gave nothing.
    """
    if group.fabric is not None:
        hand_over = _within_process(endpoint, group, deadline)
    else:
        hand_over = _between_processes(endpoint, group, token, deadline)
    for owner, descriptor in hand_over:
        try:
            endpoint.open_partition(owner, descriptor)
        finally:
            os.close(descriptor)


def _peers(group: Group) -> list[int]:
    return [rank for rank in range(group.num_ranks) if rank != group.rank]


def _within_process(endpoint: Any, group: Group, deadline: float) -> list[tuple[int, int]]:
    for writer in _peers(group):
        group.fabric.descriptors[group.rank, writer] = endpoint.export_partition(writer)
    group.meet("exported", deadline)
    return [(owner, group.fabric.descriptors.pop((owner, group.rank))) for owner in _peers(group)]


def _between_processes(endpoint: Any, group: Group, token: str, deadline: float) -> list[tuple[int, int]]:
    """By sockets beside the group's other names: whoever shares that folder shares its memory already."""
    peers = _peers(group)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as door:
        path = _door(token, group.rank)
        door.bind(str(path))
        door.listen(group.num_ranks)
        failures: list[BaseException] = []
        server = threading.Thread(target=_serve, args=(door, endpoint.export_partition, len(peers), deadline, failures))
        server.start()
        try:
            group.meet("exported", deadline)
            return [(owner, _fetch(_door(token, owner), group.rank, owner, deadline)) for owner in peers]
        finally:
            server.join()
            path.unlink(missing_ok=True)
            if failures:
                raise ConstructError(f"rank {group.rank} could not hand over its window ({failures[0]})")


def _door(token: str, rank: int) -> Path:
    return Path(f"/dev/shm/fa2a-{token}-d{rank}")


def _serve(
    door: socket.socket, export: Callable[[int], int], num_peers: int, deadline: float, failures: list[BaseException]
) -> None:
    try:
        for _ in range(num_peers):
            door.settimeout(max(deadline - time.monotonic(), 0.001))
            visitor, _ = door.accept()
            with visitor:
                visitor.settimeout(max(deadline - time.monotonic(), 0.001))
                descriptor = export(int.from_bytes(visitor.recv(4), "little"))
                try:
                    socket.send_fds(visitor, [b"!"], [descriptor])
                finally:
                    os.close(descriptor)
    except BaseException as error:  # told by the thread that waits for this one
        failures.append(error)


def _fetch(path: Path, rank: int, owner: int, deadline: float) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as way:
        way.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            way.connect(str(path))
            way.sendall(rank.to_bytes(4, "little"))
            _, descriptors, _, _ = socket.recv_fds(way, 1, 1)
        except OSError as error:
            raise ConstructError(f"rank {owner} did not hand over its window ({error})") from error
    if len(descriptors) != 1:
        raise ConstructError(f"rank {owner} handed over no window; it may have ended")
    return int(descriptors[0])
