"""The calls of NIXL EP that vLLM makes, over fault_a2a: vLLM's own ``nixl_ep`` classes run on this module unmodified.

``install()`` makes it importable as ``nixl_ep``. What it cannot do is grow: a group has the ranks that it began with.
Timeouts come from the environment (``settings``), since vLLM passes none.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fault_a2a.group import Group
from fault_a2a.integrations import settings
from fault_a2a.integrations.low_latency import (
    Done,
    Rows,
    hook_or_receive,
    install_as,
    return_rows,
    send_tokens,
    set_masked,
    write_mask,
)
from fault_a2a.integrations.rank_buffers import OpenLayer, RankBuffers

topk_idx_t = torch.int64


class Buffer:
    """One rank's end, in NIXL EP's words. Polarity of masks: 1 = masked.

    Args:
        rank: this rank.
        tcp_store_group: a ``torch.distributed`` store that all ranks reach.
        timeout_ms: how long a rank that lives may keep the others waiting; ``None``: what the environment says.

    Other arguments are about hardware that is not used.
    """

    def __init__(self, rank: int, tcp_store_group: Any = None, timeout_ms: int | None = None, **unused: Any) -> None:
        self.rank, self._store = rank, tcp_store_group
        self._timeouts = settings.timeouts() | ({} if timeout_ms is None else {"stall_ms": timeout_ms})
        self._buffers: RankBuffers | None = None
        self._num_ranks = 0

    @staticmethod
    def get_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        """Windows are sized when a layer first runs, by its shape: nothing has to be set aside."""
        return 0

    def update_memory_buffers(self, num_ranks: int, num_experts_per_rank: int, num_rdma_bytes: int) -> None:
        self._num_ranks = num_ranks

    def set_tcp_store_group(self, tcp_store_group: Any) -> None:
        self._store = tcp_store_group

    @property
    def _made(self) -> RankBuffers:
        if self._buffers is None:
            raise RuntimeError("no rank is connected yet; call connect_ranks first")
        return self._buffers

    def connect_ranks(self, remote_ranks: list[int], activate: bool = True) -> None:
        """The first call makes the group. A later one cannot make it larger.

        Raises:
            NotImplementedError: ranks would be missing, or join later.
        """
        ranks = sorted({*remote_ranks, self.rank})
        if self._buffers is not None or ranks != list(range(self._num_ranks)):
            raise NotImplementedError(
                f"ranks {ranks} of {self._num_ranks}: a group has all its ranks from the start, and cannot grow; "
                "start it with as many as it may ever have"
            )
        self._buffers = RankBuffers(Group(self._store, self.rank, self._num_ranks, "nixl_ep"), **self._timeouts)

    def disconnect_ranks(self, remote_ranks: list[int]) -> None:
        for rank in remote_ranks:
            self._made.leave_out(rank)

    # -- masks ---------------------------------------------------------------------------------------------------------

    def query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        write_mask(self._made, mask_status)

    def update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        set_masked(self._made, rank_to_mask, mask)

    def clean_mask_buffer(self) -> None:
        """Lifts what ``update_mask_buffer`` set. Who is gone stays masked: there is nobody who could answer."""
        self._made.masked.clear()
        self._made.warms_up = False
        self._made.acknowledge()

    def get_local_buffer_tensor(self, dtype: torch.dtype, size: Any = None, **unused: Any) -> torch.Tensor:
        """For callers that zero it after a fault: there is nothing to zero, as late rows are told by their words."""
        return torch.empty([0], dtype=dtype, device=self._made.device)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, OpenLayer, Done, Any]:
        rows, num_tokens, opened, hook = send_tokens(
            self._made,
            x,
            topk_idx,
            num_max_tokens=num_max_dispatch_tokens_per_rank,
            num_experts=num_experts,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
        )
        return rows, num_tokens, opened, Done(), hook_or_receive(hook, return_recv_hook)

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: OpenLayer,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Done, Any]:
        return return_rows(x, topk_weights, handle, out, return_recv_hook)

    def destroy(self) -> None:
        if self._buffers is not None:
            self._buffers.close()


def install() -> None:
    """Makes this module importable as ``nixl_ep``, for the process. Before vLLM first asks whether there is one.

    Raises:
        RuntimeError: a real nixl_ep is installed, or was imported.
    """
    install_as("nixl_ep", sys.modules[__name__])
