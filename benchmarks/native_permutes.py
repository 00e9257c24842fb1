"""Peers whose permutes are C++ (benchmarks/native/permutes.cpp) instead of torch's: the same work, tuned as ours is.

The library is built on request only, `CMAKE_ARGS=-DFA2A_BENCH_PERMUTES=ON make build`, and no wheel has it. Unlike a
peer in torch, which asks for fresh memory in every round as its users' code does, this one keeps its buffers.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from .machine import IMPORT_ROOT
from .permuted import Permuted
from .work import Batch, Shape

LIBRARY = IMPORT_ROOT / "fault_a2a" / "_permutes.so"
BUILD = "CMAKE_ARGS=-DFA2A_BENCH_PERMUTES=ON make build"
_DTYPES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}
_POINTERS = (
    *("sent_tokens", "send_counts", "recv_counts", "choice_counts", "answer_counts", "num_per_expert"),
    *("row_of_place", "place_of_choice", "weights_here", "row_starts", "answer_of_mine", "sum_of_mine", "sum_starts"),
)
_COUNTS = ("num_sent", "num_received", "num_choices")


class _Plan(ctypes.Structure):
    """``Plan`` of permutes.cpp, field by field."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _COUNTS))


@functools.cache
def _library(path: Path = LIBRARY) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    address, number = ctypes.c_void_p, ctypes.c_int64
    library.fa2a_plan.argtypes = [ctypes.POINTER(_Plan), address, address, address, *[number] * 5]
    library.fa2a_gather.argtypes = [address, address, address, number, number, number]
    library.fa2a_sum.argtypes = [address, address, address, address, address, number, number, number]
    for function in (library.fa2a_plan, library.fa2a_gather, library.fa2a_sum):
        function.restype = None
    return library


def missing_library() -> str:
    """Why there is none, and what to do; empty if there is one."""
    return "" if LIBRARY.exists() else f"its permutes in C++ are not built: run `{BUILD}` in a checkout"


class NativePermutes(Permuted):
    """Stands before a peer that moves the bytes: ``class Both(NativePermutes, Gloo)``."""

    def __init__(self, shape: Shape, rank: int, *store: Any) -> None:
        super().__init__(shape, rank, *store)
        self.library = _library()
        self.rank_of_expert, self.local_of_expert = self.rank_of.int(), self.local_of.int()
        num_local = len(self.num_per_expert)
        num_rows, num_mine = shape.ranks * shape.tokens, shape.tokens * shape.topk
        num_here = num_rows * min(shape.topk, num_local)
        sizes = {
            "sent_tokens": shape.tokens * shape.ranks,
            **dict.fromkeys(("send_counts", "recv_counts", "choice_counts", "answer_counts"), shape.ranks),
            "num_per_expert": num_local,
            **dict.fromkeys(("row_of_place", "place_of_choice", "weights_here"), num_here),
            "row_starts": num_rows + 1,
            "answer_of_mine": num_mine,
            "sum_of_mine": shape.tokens * shape.ranks,
            "sum_starts": shape.tokens + 1,
        }
        self.arrays = {
            name: torch.zeros(size, dtype=torch.float32 if name == "weights_here" else torch.int64)
            for name, size in sizes.items()
        }
        self.plan = _Plan(*(self.arrays[name].data_ptr() for name in _POINTERS))
        self.topk_starts = torch.arange(0, num_mine + 1, shape.topk)
        self.buffers = {
            "sent": self._rows(shape.tokens * min(shape.ranks, shape.topk)),
            "arrived": self._rows(num_rows),
            "received": self._rows(num_here),
            "returned": self._rows(num_here),
            "answers": self._rows(num_mine),
        }
        self.gathered = torch.empty([shape.ranks * 2 * num_mine], dtype=torch.int32)

    def _rows(self, count: int) -> torch.Tensor:
        return torch.empty([count, self.shape.hidden], dtype=self.shape.torch_dtype)

    def dispatch(self, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        shape = self.shape
        routing = torch.stack([batch.topk_idx.int(), batch.topk_weights.view(torch.int32)])
        self.gather(self.gathered, routing.view(-1))
        plan, arrays = self.plan, self.arrays
        self.library.fa2a_plan(
            *(ctypes.byref(plan), self.gathered.data_ptr(), self.rank_of_expert.data_ptr()),
            *(self.local_of_expert.data_ptr(), shape.ranks, shape.tokens, shape.topk, len(self.num_per_expert)),
            self.rank,
        )
        self.num_per_expert = arrays["num_per_expert"]
        counts = {name: arrays[name].tolist() for name in ("send_counts", "recv_counts")}
        sent = self._gathered("sent", batch.x, arrays["sent_tokens"], plan.num_sent)
        arrived = self.buffers["arrived"][: plan.num_received]
        self.exchange(arrived, sent, counts["recv_counts"], counts["send_counts"])
        received = self._gathered("received", arrived, arrays["row_of_place"], plan.num_choices)
        return received, {"weights": batch.topk_weights, **counts}

    def combine(self, received: torch.Tensor, handle: dict[str, Any]) -> torch.Tensor:
        shape, arrays, plan = self.shape, self.arrays, self.plan
        out = self._rows(shape.tokens)
        if shape.reduce == "owner":
            returned = self._gathered("returned", received, arrays["place_of_choice"], plan.num_choices)
            answers = self.buffers["answers"]
            self.exchange(answers, returned, *(arrays[name].tolist() for name in ("answer_counts", "choice_counts")))
            self._sum(out, answers, arrays["answer_of_mine"], self.topk_starts, handle["weights"])
            return out
        returned = self.buffers["returned"][: plan.num_received]
        self._sum(returned, received, arrays["place_of_choice"], arrays["row_starts"], arrays["weights_here"])
        answers = self.buffers["answers"][: plan.num_sent]
        self.exchange(answers, returned, handle["send_counts"], handle["recv_counts"])
        self._sum(out, answers, arrays["sum_of_mine"], arrays["sum_starts"], None)
        return out

    def _gathered(self, name: str, rows: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
        out = self.buffers[name][:count]
        self.library.fa2a_gather(
            *(out.data_ptr(), rows.data_ptr(), indices.data_ptr(), count, self.shape.row_bytes, self.shape.ranks)
        )
        return out

    def _sum(
        self,
        out: torch.Tensor,
        rows: torch.Tensor,
        indices: torch.Tensor,
        starts: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> None:
        """A bag of rows for each row of ``out``; see ``fa2a_sum``."""
        self.library.fa2a_sum(
            *(out.data_ptr(), rows.data_ptr(), indices.data_ptr(), starts.data_ptr()),
            *(None if weights is None else weights.data_ptr(), len(out), self.shape.hidden, _DTYPES[rows.dtype]),
        )
