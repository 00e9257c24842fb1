"""One MoE layer as vLLM has it, on the CPU: its kernel, experts that need no GPU, and what the layer must compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.experts.fused_batched_moe as fused_batched_moe
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
    fp8_w8a8_moe_quant_config,
)

from fault_a2a import reference
from fault_a2a.rounds import Outcome

# Asks an accelerator that is not there.
fused_batched_moe._is_capturing_or_compiling = lambda: False

DELIVERED, LOST, UNROUTABLE = 1, 2, 3
BLOCK = 128


class Experts(fused_batched_moe.NaiveBatchedExperts):
    """vLLM's own reference experts, but for the activation, which stands in a library for GPUs."""

    packed_scales = False

    def supports_packed_ue8m0_act_scales(self) -> bool:
        return self.packed_scales

    def activation(self, activation: Any, output: torch.Tensor, input: torch.Tensor, **_: Any) -> None:
        gate, up = input.float().chunk(2, dim=-1)
        output.copy_(torch.nn.functional.silu(gate) * up)


class PackedScaleExperts(Experts):
    """As experts that read scales as powers of two, four to a word."""

    packed_scales = True

    def dequant(self, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if scale.dtype == torch.int32:
            scale = (scale.contiguous().view(torch.uint8).to(torch.int32) << 23).view(torch.float32)
            scale = scale[..., : -(-t.shape[-1] // BLOCK)]
        return super().dequant(t, scale)


@dataclass(frozen=True)
class Layer:
    """The shape of a layer, and everything that follows from a seed."""

    num_ranks: int = 4
    num_local_experts: int = 2
    hidden: int = 128
    intermediate: int = 64
    num_topk: int = 3
    num_max_tokens: int = 16
    quantized: str = ""  # "", "float32" or "ue8m0"

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.num_local_experts

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(1000 + expert)
        w1 = torch.randn([2 * self.intermediate, self.hidden], generator=draw) / self.hidden**0.5
        w2 = torch.randn([self.hidden, self.intermediate], generator=draw) / self.intermediate**0.5
        return w1.bfloat16(), w2.bfloat16()

    def local_weights(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = rank * self.num_local_experts
        both = [self.weights(expert) for expert in range(first, first + self.num_local_experts)]
        return torch.stack([w1 for w1, _ in both]), torch.stack([w2 for _, w2 in both])

    def tokens(self, rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x, topk_ids, topk_weights); the number of tokens changes from step to step, and is zero now and then."""
        draw = torch.Generator().manual_seed(10_000 * step + rank)
        num_tokens = 0 if (step + rank) % 7 == 6 else self.num_max_tokens - (step + rank) % 3
        x = torch.randn([num_tokens, self.hidden], generator=draw).bfloat16()
        order = torch.rand([num_tokens, self.num_experts], generator=draw).argsort(dim=1)
        weights = torch.rand([num_tokens, self.num_topk], generator=draw).softmax(dim=1)
        return x, order[:, : self.num_topk].contiguous(), weights

    def quant_config(self, rank: int) -> FusedMoEQuantConfig:
        if not self.quantized:
            return FUSED_MOE_UNQUANTIZED_CONFIG
        w1, w2 = self.local_weights(rank)

        def ones(weights: torch.Tensor) -> torch.Tensor:
            return torch.ones([weights.shape[0], -(-weights.shape[1] // BLOCK), -(-weights.shape[2] // BLOCK)])

        return fp8_w8a8_moe_quant_config(w1_scale=ones(w1), w2_scale=ones(w2), block_shape=[BLOCK, BLOCK])

    def moe_config(self, parallel: FusedMoEParallelConfig) -> FusedMoEConfig:
        return FusedMoEConfig(
            num_experts=self.num_experts,
            experts_per_token=self.num_topk,
            hidden_dim=self.hidden,
            intermediate_size=self.intermediate,
            num_local_experts=self.num_local_experts,
            num_logical_experts=self.num_experts,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=parallel,
            in_dtype=torch.bfloat16,
            max_num_tokens=self.num_max_tokens,
        )

    def parallel_config(self, rank: int, backend: str = "nixl_ep") -> FusedMoEParallelConfig:
        n = self.num_ranks
        return FusedMoEParallelConfig(
            tp_size=1,
            pcp_size=1,
            dp_size=n,
            ep_size=n,
            tp_rank=0,
            pcp_rank=0,
            dp_rank=rank,
            ep_rank=rank,
            sp_size=1,
            use_ep=True,
            all2all_backend=backend,
            enable_eplb=False,
        )

    def experts_class(self) -> type[Experts]:
        return PackedScaleExperts if self.quantized == "ue8m0" else Experts

    def kernel(self, prepare_finalize: Any, rank: int) -> mk.FusedMoEKernel:
        experts = self.experts_class()(
            moe_config=self.moe_config(self.parallel_config(rank)),
            quant_config=self.quant_config(rank),
            max_num_tokens=self.num_max_tokens,
            num_dispatchers=self.num_ranks,
        )
        return mk.FusedMoEKernel(prepare_finalize, experts)

    def run(self, kernel: mk.FusedMoEKernel, rank: int, step: int) -> torch.Tensor:
        """The layer's output, through vLLM's own FusedMoEKernel.apply."""
        x, topk_ids, topk_weights = self.tokens(rank, step)
        w1, w2 = self.local_weights(rank)
        return kernel.apply(
            hidden_states=x,
            w1=w1,
            w2=w2,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            activation=MoEActivation.SILU,
            global_num_experts=self.num_experts,
            expert_map=None,
            apply_router_weight_on_input=False,
        )

    def expected(self, rank: int, step: int, delivered: torch.Tensor) -> torch.Tensor:
        """The output with exactly these choices, in float32 from the rows that were sent."""
        x, topk_ids, topk_weights = self.tokens(rank, step)
        rows = x.float()
        if self.quantized:
            rows = reference.dequantize_1x128(*reference.quantize_1x128(x, scale=self.quantized))
        out = torch.zeros([x.shape[0], self.hidden])
        for token, choice in delivered.nonzero().tolist():
            w1, w2 = self.weights(int(topk_ids[token, choice]))
            gate, up = (
                (rows[token].bfloat16().float() if not self.quantized else rows[token]).matmul(w1.float().T).chunk(2)
            )
            hidden = (torch.nn.functional.silu(gate) * up).bfloat16()
            out[token] += topk_weights[token, choice] * hidden.float().matmul(w2.float().T)
        return out

    def wrong(
        self, rank: int, step: int, out: torch.Tensor, outcome: Outcome, dead: set[int], healthy: bool
    ) -> list[str]:
        """What is wrong with a step: its numbers against the reference on its outcome, and the outcome itself."""
        _, topk_ids, _ = self.tokens(rank, step)
        to_dead = torch.zeros_like(topk_ids, dtype=torch.bool)
        for one in dead:
            to_dead |= topk_ids // self.num_local_experts == one
        found = []
        if not bool((outcome.codes[~to_dead] == DELIVERED).all()):
            found.append(f"rank {rank} step {step}: choices of ranks that live were not delivered")
        if healthy and not bool((outcome.codes[to_dead] == UNROUTABLE).all()):
            found.append(f"rank {rank} step {step}: choices of a rank that is gone are not unroutable")
        error = (out.float() - self.expected(rank, step, outcome.delivered)).abs().max().item() if out.numel() else 0.0
        if not error <= 0.03:
            found.append(f"rank {rank} step {step}: off the reference on its outcome by {error}")
        return found
