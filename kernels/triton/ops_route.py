"""Routing: the best logical experts of each token, and of each a physical one on a rank that is in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fault_a2a.kernels.triton.layout import constant
from fault_a2a.kernels.triton.numbers import INFINITY, MAGNITUDE
from fault_a2a.kernels.triton.target import kernel, launch
from fault_a2a.kernels.triton.words import counted, integers, load32, max_of, running_sum, store32, store64, sum_of

# A score and an expert in one number, so that one reduction finds the best and settles equal scores.
EXPERT_BITS = constant(17)
LAST_EXPERT = constant((1 << 17) - 1)
CHOSEN = constant(-(1 << 62))


@kernel
def route_tokens(
    scores, replicas, expert_rank, active_mask, topk_idx, topk_weights, first_token,
    NUM_LOGICAL: tl.constexpr, NUM_REPLICAS: tl.constexpr, NUM_PHYSICAL: tl.constexpr, NUM_RANKS: tl.constexpr,
    NUM_TOPK: tl.constexpr, LOGICAL_BLOCK: tl.constexpr, REPLICAS_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token."""
    token = tl.program_id(0).to(tl.int64)
    logical = integers(LOGICAL_BLOCK)
    bits = load32(scores + 4 * (token * NUM_LOGICAL + logical), logical < NUM_LOGICAL)
    magnitude = bits & MAGNITUDE
    # Floats as integers of the same order; both zeros are one, and a NaN of either sign is above all.
    order = tl.where((bits < 0) & (magnitude <= INFINITY), -magnitude, tl.where(magnitude > INFINITY, MAGNITUDE, bits))
    key = tl.where(logical < NUM_LOGICAL, (order << EXPERT_BITS) + LAST_EXPERT - logical, CHOSEN)
    replica = integers(REPLICAS_BLOCK)
    for k in range(NUM_TOPK):
        best = LAST_EXPERT - (max_of(key, 0) & LAST_EXPERT)
        is_best = logical == best
        inside = replica < NUM_REPLICAS
        physical = load32(replicas + 4 * (best * NUM_REPLICAS + replica), inside)
        # What names no expert, or one on no rank, is padding: it addresses nothing.
        inside = inside & (physical >= 0) & (physical < NUM_PHYSICAL)
        rank = load32(expert_rank + 4 * physical, inside)
        inside = inside & (rank >= 0) & (rank < NUM_RANKS)
        live = inside & (load32(active_mask + 4 * rank, inside) != 0)
        num_live = sum_of(counted(live), 0)
        turn = (first_token + token) % tl.where(num_live > 0, num_live, 1)
        mine = live & (running_sum(counted(live), 0) - 1 == turn)
        idx = tl.where(num_live > 0, sum_of(tl.where(mine, physical, 0), 0), -1)
        store64(topk_idx + 8 * (token * NUM_TOPK + k), idx)
        store32(topk_weights + 4 * (token * NUM_TOPK + k), sum_of(tl.where(is_best, bits, 0), 0))
        key = tl.where(is_best, CHOSEN, key)


def constants(num_logical: int, num_replicas: int, num_physical: int, num_ranks: int, num_topk: int) -> dict[str, int]:
    """What ``route_tokens`` is compiled for."""
    return {
        "NUM_LOGICAL": num_logical,
        "NUM_REPLICAS": num_replicas,
        "NUM_PHYSICAL": num_physical,
        "NUM_RANKS": num_ranks,
        "NUM_TOPK": num_topk,
        "LOGICAL_BLOCK": triton.next_power_of_2(num_logical),
        "REPLICAS_BLOCK": triton.next_power_of_2(num_replicas),
    }


def route(
    scores: torch.Tensor,
    replicas: torch.Tensor,
    expert_rank: torch.Tensor,
    active_mask: torch.Tensor,
    num_topk: int,
    first_token: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference.route``. Its arguments were checked."""
    num_tokens = scores.shape[0]
    topk_idx = torch.empty(num_tokens, num_topk, dtype=torch.int64, device=scores.device)
    topk_weights = torch.empty(num_tokens, num_topk, dtype=torch.float32, device=scores.device)
    tensors = (scores, replicas, expert_rank, active_mask, topk_idx, topk_weights)
    sizes = constants(*replicas.shape, len(expert_rank), len(active_mask), num_topk)
    addresses = [tensor.data_ptr() for tensor in tensors]
    launch(route_tokens, num_tokens, *addresses, first_token, *sizes.values())
    return topk_idx, topk_weights
