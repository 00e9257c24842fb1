"""The low-latency calls of DeepEP, over fault_a2a: callers switch by ``from fault_a2a.integrations import deep_ep``.

``install()`` makes it importable as ``deep_ep``, for callers whose imports are not to be changed.

Only the low-latency half: ``dispatch`` and ``combine`` of the other are not here. Timeouts come from the environment
(``settings``), as DeepEP's own cannot be passed either.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fault_a2a.integrations import settings
from fault_a2a.integrations.low_latency import (
    Done,
    Rows,
    hook_or_receive,
    install_as,
    no_stats,
    return_rows,
    send_tokens,
    set_masked,
    write_mask,
)
from fault_a2a.integrations.rank_buffers import OpenLayer, RankBuffers

topk_idx_t = torch.int64


class Buffer:
    """One rank's end, in DeepEP's words. Polarity of masks: 1 = masked. Every rank makes the same calls.

    Args:
        group: a ``torch.distributed`` process group, or whatever ``fault_a2a.Buffer`` takes.
        low_latency_mode: must be true; the other arguments are about hardware that is not used.
    """

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        **unused: Any,
    ) -> None:
        if not low_latency_mode:
            raise NotImplementedError("only the low-latency calls are here; pass low_latency_mode=True")
        self._buffers = RankBuffers(group, **settings.timeouts())
        self.rank, self.group_size = self._buffers.rank, self._buffers.num_ranks

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Windows are sized when a layer first runs, by its shape: nothing has to be set aside."""
        return 0

    # -- masks ---------------------------------------------------------------------------------------------------------

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        write_mask(self._buffers, mask_status)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        set_masked(self._buffers, rank_to_mask, mask)

    def low_latency_clean_mask_buffer(self) -> None:
        """Lifts what ``low_latency_update_mask_buffer`` set. Who is gone stays masked: nobody there could answer."""
        self._buffers.masked.clear()
        self._buffers.warms_up = False
        self._buffers.acknowledge()

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to clean: words carry their round, and are never reset."""

    def get_local_buffer_tensor(self, dtype: torch.dtype, size: Any = None, **unused: Any) -> torch.Tensor:
        """For callers that zero it after a fault: there is nothing to zero, as late rows are told by their words."""
        return torch.empty([0], dtype=dtype, device=self._buffers.device)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, OpenLayer, Done, Any]:
        """(rows or (rows, scales), rows of each local expert, handle, event, hook or ``None``).

        Rows are ``[num_local_experts, num_ranks * num_max_dispatch_tokens_per_rank, hidden]``.
        """
        no_stats(dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats)
        rows, num_tokens, opened, hook = send_tokens(
            self._buffers,
            x,
            topk_idx,
            num_max_tokens=num_max_dispatch_tokens_per_rank,
            num_experts=num_experts,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
        )

        def receive() -> None:
            hook()
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(num_tokens)

        return rows, num_tokens, opened, Done(), hook_or_receive(receive, return_recv_hook)

    def low_latency_combine(
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
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Done, Any]:
        """(sums ``[num_tokens, hidden]``, event, hook); exactly the delivered choices, as ``Buffer.combine``."""
        no_stats(combine_wait_recv_cost_stats=combine_wait_recv_cost_stats)
        return return_rows(x, topk_weights, handle, out, return_recv_hook)

    def get_next_low_latency_combine_buffer(self, handle: OpenLayer) -> torch.Tensor:
        """Memory for the experts' output; any other will do as well."""
        return handle.handle.buffer.empty_expert_output()

    def destroy(self) -> None:
        self._buffers.close()


def install() -> None:
    """Makes this module importable as ``deep_ep``, for the process. Before anybody asks whether there is one.

    Raises:
        RuntimeError: a real deep_ep is installed, or was imported.
    """
    install_as("deep_ep", sys.modules[__name__])
