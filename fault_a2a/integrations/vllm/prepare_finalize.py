"""vLLM's prepare and finalize over fault_a2a: batched experts, two micro-batches, bfloat16 or fp8 on the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input, normalize_batched_scales_shape
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_maybe_run_recv_hook

from fault_a2a.config import HIDDEN_MULTIPLE, MAX_HIDDEN, SCALE_BLOCK
from fault_a2a.integrations.rank_buffers import LayerShape, OpenLayer, RankBuffers, backend_for
from fault_a2a.integrations.scale_layout import column_major
from fault_a2a.rounds import Received

QUANT_BLOCK_SHAPE = [SCALE_BLOCK, SCALE_BLOCK]
NUM_MICRO_BATCHES = 2


class FaultA2APrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    """One MoE layer's way to its experts and back.

    ``prepare`` and ``finalize`` block until every active rank's rows are here or its loss is certain; a dead rank
    raises nothing. ``prepare_async`` and ``finalize_async`` only send; the hook that they return receives. Every rank
    must run its layers in the same order. Run eagerly on the CPU; neither run on a GPU nor captured in a graph so far.

    Args:
        buffers: what the all-to-all manager's ``get_handle`` returned.
        max_tokens_per_rank: most tokens that this rank passes to one ``prepare``.
        num_dispatchers: ranks of the group.
        expert_capacity: physical experts of the whole group.
        use_fp8_dispatch: rows travel as fp8 e4m3, with a scale for each 128 elements.
        global_to_physical: where each expert stands, if not in the order of its number.
    """

    def __init__(
        self,
        buffers: RankBuffers,
        max_tokens_per_rank: int,
        num_dispatchers: int,
        expert_capacity: int,
        use_fp8_dispatch: bool = False,
        global_to_physical: torch.Tensor | None = None,
        physical_to_global: torch.Tensor | None = None,
        local_expert_global_ids: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        if expert_capacity % num_dispatchers:
            raise ValueError(f"expert_capacity {expert_capacity} is no multiple of num_dispatchers {num_dispatchers}")
        self.buffers = buffers
        self.max_tokens_per_rank = max_tokens_per_rank
        self.num_dispatchers_ = num_dispatchers
        self.num_local_experts = expert_capacity // num_dispatchers
        self.use_fp8_dispatch = use_fp8_dispatch
        self.use_ue8m0_dispatch = False
        # vLLM's expert map reads these two off the object; rounds need only the first.
        self.physical_to_global = _as_int64(physical_to_global)
        self.local_expert_global_ids = _as_int64(local_expert_global_ids)
        self.global_to_physical = _as_int64(global_to_physical)
        self._open: list[OpenLayer | None] = [None] * NUM_MICRO_BATCHES

    # -- what vLLM asks of the class -----------------------------------------------------------------------------------

    @staticmethod
    def maybe_roundup_layer_hidden_size(hidden_size: int) -> int:
        """Rows are whole 16-byte words; otherwise any size will do."""
        rounded = -(-hidden_size // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
        if rounded > MAX_HIDDEN:
            raise ValueError(f"hidden_size {hidden_size} is above {MAX_HIDDEN}, the most that fault_a2a takes")
        return rounded

    def post_init_setup(self, fused_experts: Any) -> None:
        self.use_ue8m0_dispatch = self.use_fp8_dispatch and fused_experts.supports_packed_ue8m0_act_scales()

    @property
    def activation_format(self) -> Any:
        return mk.FusedMoEActivationFormat.BatchedExperts

    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int64

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_tokens_per_rank

    def num_dispatchers(self) -> int:
        return self.num_dispatchers_

    def output_is_reduced(self) -> bool:
        return True

    def supports_async(self) -> bool:
        return True

    # -- to the experts ------------------------------------------------------------------------------------------------

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> tuple[Callable[[], None], Callable[[], Any]]:
        if defer_input_quant:
            raise NotImplementedError("these experts want to quantise rows themselves; pick others (--moe-backend)")
        if _has_scale_per_token(quant_config):
            raise NotImplementedError("scales that are given per token cannot be split over ranks; use dynamic ones")
        if apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise NotImplementedError(
                    f"apply_router_weight_on_input with {topk_ids.shape[1]} choices a token; vLLM defines it for one"
                )
            a1 = a1 * topk_weights.to(a1.dtype)
            topk_weights = torch.ones_like(topk_weights)
        if self.global_to_physical is not None:
            topk_ids = self.global_to_physical[topk_ids]
        received, opened, hook = self.buffers.dispatch(self._shape(a1, topk_ids), a1, topk_ids, topk_weights)
        self._open[dbo_current_ubatch_id()] = opened
        return hook, lambda: self._prepared(received, quant_config)

    def prepare(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> Any:
        hook, receiver = self.prepare_async(
            a1,
            topk_weights,
            topk_ids,
            num_experts,
            expert_map,
            apply_router_weight_on_input,
            quant_config,
            defer_input_quant,
        )
        hook()
        return receiver()

    def _shape(self, a1: torch.Tensor, topk_ids: torch.Tensor) -> LayerShape:
        return LayerShape(
            hidden=a1.shape[1],
            num_local_experts=self.num_local_experts,
            num_topk=topk_ids.shape[1],
            num_max_tokens=self.max_tokens_per_rank,
            dtype=a1.dtype,
            quantized=("ue8m0" if self.use_ue8m0_dispatch else "float32") if self.use_fp8_dispatch else "",
            backend=backend_for(a1),
        )

    def _prepared(self, received: Received, quant_config: Any) -> Any:
        x, scales = received.x, received.scales
        if scales is not None:
            scales = column_major(scales)
        else:
            x, scales = _quantized_here(x, quant_config)
        # No counts on the host: they would have to be waited for.
        metadata = mk.ExpertTokensMetadata(expert_num_tokens=received.num_tokens, expert_num_tokens_cpu=None)
        return x, scales, metadata, None, None

    # -- and back ------------------------------------------------------------------------------------------------------

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: Any,
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        if not isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            raise NotImplementedError(
                f"these experts weigh and sum by {type(weight_and_reduce_impl).__name__}; combine does that here, so "
                "pick experts that leave it to finalize"
            )
        batch = dbo_current_ubatch_id()
        opened, self._open[batch] = self._open[batch], None
        if opened is None:
            raise RuntimeError("finalize without a prepare before it; call prepare for this micro-batch first")
        # The other micro-batch's rows are received first: rounds are combined in the order in which they began.
        dbo_maybe_run_recv_hook()
        _, hook = opened.combine(fused_expert_output, output)
        return hook, lambda: None

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: Any,
    ) -> None:
        hook, receiver = self.finalize_async(
            output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input, weight_and_reduce_impl
        )
        hook()
        receiver()


def _as_int64(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(torch.int64)


def _has_scale_per_token(quant_config: Any) -> bool:
    scale = quant_config.a1_scale if quant_config.a1_scale is not None else quant_config.a2_scale
    return scale is not None and scale.numel() != 1


def _quantized_here(x: torch.Tensor, quant_config: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What experts want of rows that travelled as they are."""
    dtype = None if quant_config.quant_dtype == "nvfp4" else quant_config.quant_dtype
    if dtype is None:
        return x, None
    num_experts, _, hidden = x.shape
    rows, scales = moe_kernel_quantize_input(
        x.view(-1, hidden),
        quant_config.a1_scale,
        dtype,
        quant_config.per_act_token_quant,
        quant_config.block_shape,
    )
    return rows.view(num_experts, -1, hidden), normalize_batched_scales_shape(scales, num_experts)
