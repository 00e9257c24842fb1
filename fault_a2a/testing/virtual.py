"""Virtual ranks: a whole group in one process, a thread a rank, over the same native code as real processes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fault_a2a._core import core
from fault_a2a.backends import resolved
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.gpu import device_of, has_twin
from fault_a2a.group import Group

T = TypeVar("T")

# Without these a rank's launch may wait for the kernel of another rank, which waits for that launch: streams share the
# GPU's queues, eight unless more are asked for, and code that is loaded at its first launch waits for the whole device.
CUDA_SETTINGS = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}


@dataclass
class LocalFabric:
    """The windows of all virtual ranks, made by the first rank that asks."""

    extra: dict[str, Any] = field(default_factory=dict)
    _group: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, fields: dict[str, Any]) -> Any:
        fields.update(self.extra)
        with self._lock:
            if self._group is None:
                self._group = core.LocalGroup(fields)
            return self._group


class VirtualRanks:
    """A group of ``num_ranks`` threads.

    Args:
        num_ranks: how many.
        config: of every rank.
        backends: who runs the kernels of each rank, in turn; ``None``: as ``config`` says.
        extra: fields for the native core that no Config has, such as ``first_round``, ``first_epoch``, ``poison``.

    ``run(work)`` calls ``work(buffer)`` on every rank's thread and returns what each returned or raised.

    On a GPU, which the ranks then share, ``CUDA_DEVICE_MAX_CONNECTIONS=32`` and ``CUDA_MODULE_LOADING=EAGER`` keep one
    rank's launches from waiting behind another's kernels. CUDA reads them once, when it starts: this sets them where
    they are missing, in time if nothing has asked CUDA before; better, set them before the process starts.
    """

    def __init__(self, num_ranks: int, config: Config, *, backends: Sequence[str] | None = None, **extra: Any) -> None:
        named = set(backends or [config.backend])
        if named & {"cuda", "auto"} and not has_twin():
            set_up_cuda()
        store, fabric = dist.HashStore(), LocalFabric(extra)
        groups = [Group(store, rank, num_ranks, fabric=fabric) for rank in range(num_ranks)]
        self.config = config
        turns = itertools.cycle(backends or [config.backend])
        # "auto" is settled here already: whether a rank needs a stream depends on it.
        configs = [
            resolved(dataclasses.replace(config, backend=backend)) for backend, _ in zip(turns, groups, strict=False)
        ]
        self._streams = [_stream_for(config.backend) for config in configs]
        makers = map(partial, itertools.repeat(Buffer), groups, configs)
        self.buffers: list[Buffer] = run_threads(list(map(self._on_stream, range(num_ranks), makers)))

    def _on_stream(self, rank: int, call: Callable[[], T]) -> Callable[[], T]:
        """On a GPU a stream of its own: in one that they share, a rank would wait for kernels that stand behind its."""

        def on_stream() -> T:
            with torch.cuda.stream(self._streams[rank]):
                return call()

        return on_stream if self._streams[rank] is not None else call

    def run(self, work: Callable[[Buffer], T], ranks: list[int] | None = None) -> list[Any]:
        chosen = range(len(self.buffers)) if ranks is None else ranks
        calls = [self._on_stream(rank, partial(work, self.buffers[rank])) for rank in chosen]
        return run_threads(calls, keep_errors=True)

    def close(self) -> None:
        run_threads([self._on_stream(rank, buffer.close) for rank, buffer in enumerate(self.buffers)])

    def __enter__(self) -> VirtualRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def set_up_cuda() -> None:
    """Sets what is missing of ``CUDA_SETTINGS``; warns where CUDA runs without it already."""
    if not torch.cuda.is_initialized():
        for name, value in CUDA_SETTINGS.items():
            os.environ.setdefault(name, value)
        return
    # torch sets the second to LAZY when it starts CUDA.
    missing = [name for name in CUDA_SETTINGS if os.environ.get(name, "LAZY") == "LAZY"]
    if missing:
        settings = " ".join(f"{name}={CUDA_SETTINGS[name]}" for name in missing)
        warnings.warn(
            f"CUDA has started without {settings}: virtual ranks on one GPU may wait for each other until a timeout. "
            "Set it before the process starts",
            stacklevel=3,
        )


def _stream_for(backend: str) -> torch.cuda.Stream | None:
    return torch.cuda.Stream() if device_of(backend).type == "cuda" else None


def run_threads(calls: list[Callable[[], Any]], keep_errors: bool = False, timeout_s: float = 120.0) -> list[Any]:
    """Calls each in a thread of its own; a call that outlasts the time is an error that names it, never a hang."""
    results: list[Any] = [None] * len(calls)

    def call(idx: int) -> None:
        try:
            results[idx] = calls[idx]()
        except BaseException as error:
            results[idx] = error

    threads = [threading.Thread(target=call, args=(idx,), daemon=True) for idx in range(len(calls))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    stuck = [idx for idx, thread in enumerate(threads) if thread.is_alive()]
    if stuck:
        raise TimeoutError(f"calls {stuck} did not return within {timeout_s} s")
    for result in results:
        if isinstance(result, BaseException) and not keep_errors:
            raise result
    return results
