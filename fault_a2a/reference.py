"""What the verbs mean, in plain torch and dead ranks included; slow, and the measure of every kernel's bits.

Nothing here communicates: each function is told which ranks were heard and computes what one rank must then hold.
A kernel is right when its output has the same bits (``same_bits``) as these functions on the outcome it reports.
Run them eagerly: a compiler that fuses a multiply and an add into one rounding computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from fault_a2a.placement import Placement

# The codes of outcome.codes, one per (token, choice).
NONE, DELIVERED, LOST, UNROUTABLE = 0, 1, 2, 3

_NO_RANK = -1

# fp8 rows: so many elements share a scale.
QUANTIZED_BLOCK = 128
_E4M3_MAX, _SMALLEST_AMAX = 448.0, 1e-4


class Received(NamedTuple):
    """What a rank holds after ``dispatch``.

    ``x``: batched ``[num_local_experts, num_ranks * num_max_tokens_per_rank, hidden]``, rows behind the last received
    one are zeros here and unspecified in a ``Buffer``; packed ``[num_recv, hidden]``. ``num_tokens``: int32
    ``[num_local_experts]``. ``offsets``: int32 ``[num_local_experts + 1]``, the running sum of ``num_tokens``.
    ``sources``: int32 ``[num_rows, 5]``, one line per received row: (row of ``x`` seen as 2-D, local expert, source
    rank, token on that rank, choice of that token).
    """

    x: torch.Tensor
    num_tokens: torch.Tensor
    offsets: torch.Tensor
    sources: torch.Tensor


def dispatch(
    xs: Sequence[torch.Tensor | None],
    topk_idxs: Sequence[torch.Tensor | None],
    placement: Placement,
    rank: int,
    delivered_srcs: Collection[int],
    recv_format: str = "batched",
    num_max_tokens_per_rank: int | None = None,
) -> Received:
    """What ``rank`` receives when it took the rows of the ranks ``delivered_srcs`` and of no other.

    Args:
        xs: of each rank, its ``x`` ``[num_tokens, hidden]``; may be ``None`` for a rank that was not taken, but at
            least one must be there to tell ``hidden`` and the dtype.
        topk_idxs: of each rank, its ``topk_idx`` ``[num_tokens, num_topk]``, -1 for no expert.
        placement: which rank holds which expert.
        rank: the receiver.
        delivered_srcs: source ranks taken in this round, in any order.
        recv_format: ``"batched"`` or ``"packed"``.
        num_max_tokens_per_rank: only batched needs it; the capacity of an expert is ``num_ranks`` times this.

    The rows of an expert stand by source rank, then by token.
    """
    sources = _received_choices(topk_idxs, placement, rank, delivered_srcs)
    num_local_experts = placement.num_local_experts(rank)
    num_tokens = torch.bincount(sources[:, 1], minlength=num_local_experts)
    offsets = torch.cat([num_tokens.new_zeros(1), num_tokens.cumsum(0)])
    position = torch.arange(len(sources))  # of each row in the packed order
    template = next(x for x in xs if x is not None)
    hidden = template.shape[1]

    if recv_format == "batched":
        if num_max_tokens_per_rank is None:
            raise ValueError('num_max_tokens_per_rank: the batched format is sized by it; pass it, or "packed".')
        capacity = placement.num_ranks * num_max_tokens_per_rank
        row = sources[:, 1] * capacity + position - offsets[sources[:, 1]]
        flat = torch.zeros(num_local_experts * capacity, hidden, dtype=template.dtype)
        shape: tuple[int, ...] = (num_local_experts, capacity, hidden)
    elif recv_format == "packed":
        row = position
        flat = torch.zeros(len(sources), hidden, dtype=template.dtype)
        shape = (len(sources), hidden)
    else:
        raise ValueError(f'recv_format: "{recv_format}" is not known; pass "batched" or "packed".')

    for src in delivered_srcs:
        from_src = sources[:, 2] == src
        flat[row[from_src]] = xs[src][sources[from_src, 3]]  # type: ignore[index]
    sources[:, 0] = row
    return Received(flat.view(shape), num_tokens.int(), offsets.int(), sources.int())


def _received_choices(
    topk_idxs: Sequence[torch.Tensor | None], placement: Placement, rank: int, delivered_srcs: Collection[int]
) -> torch.Tensor:
    """int64 [num_rows, 5], the first column still zero: every choice of a local expert, in the order of the rows."""
    srcs = sorted(delivered_srcs)
    chosen = [torch.as_tensor(topk_idxs[src]) for src in srcs]
    if not chosen:
        return torch.zeros(0, 5, dtype=torch.int64)
    src_rank = torch.cat([torch.full((len(idx),), src) for src, idx in zip(srcs, chosen, strict=True)])
    token = torch.cat([torch.arange(len(idx)) for idx in chosen])
    all_chosen = torch.cat(chosen)
    parts = [torch.zeros(0, 5, dtype=torch.int64)]
    for local_expert, expert in enumerate(placement.local_experts(rank)):
        line, choice = (all_chosen == expert).nonzero(as_tuple=True)  # by line (source, token), then choice
        zero = torch.zeros_like(line)
        parts.append(torch.stack([zero, zero + local_expert, src_rank[line], token[line], choice], dim=1))
    return torch.cat(parts)


def combine(
    rows: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    delivered: torch.Tensor,
    *,
    reduce: str = "owner",
    placement: Placement | None = None,
    on_lost: str = "drop",
    weights_at: str = "owner",
) -> torch.Tensor:
    """The weighted sum of the expert rows of each token, over the delivered choices only. Bit for bit.

    Args:
        rows: ``[num_tokens, num_topk, hidden]``, the expert's row of each choice. A row that was not delivered is not
            looked at: it may hold anything, NaN included.
        topk_idx: ``[num_tokens, num_topk]``, -1 for no expert.
        topk_weights: float32 ``[num_tokens, num_topk]``.
        delivered: ``[num_tokens, num_topk]``, bool, or the uint8 codes of an outcome (only 1 counts as delivered).
        reduce: ``"owner"``: the choices are summed in their order. ``"expert"``: each rank of ``placement`` sums its
            choices in their order and rounds to the dtype of ``rows``; these are summed by ascending rank.
        placement: needed for ``reduce="expert"``.
        on_lost: ``"drop"``, or ``"renormalize"``: a token that lost a choice is scaled by
            (sum of the weights it asked for) / (sum of the weights delivered), and is zero if the latter is.
        weights_at: ``"owner"``: here; ``"expert"``: the rows have their weights already, and are summed as they are.

    Returns:
        ``[num_tokens, hidden]`` in the dtype of ``rows``.

    All sums are float32, start at +0.0, and round after the multiplication and again after the addition; the one
    rounding to the dtype comes last. A NaN stays a NaN; which of the NaN's bit patterns is not specified.
    """
    is_delivered = (delivered.to(torch.uint8) == DELIVERED) & (topk_idx != -1)
    if weights_at not in ("owner", "expert"):
        raise ValueError(f'weights_at: "{weights_at}" is not known; pass "owner" or "expert".')
    weights = topk_weights if weights_at == "owner" else torch.ones_like(topk_weights)
    if reduce == "owner":
        total = _weighted_sum(rows, weights, is_delivered)
    elif reduce == "expert":
        total = _sum_of_partial_sums(rows, weights, is_delivered, _choice_ranks(topk_idx, placement))
    else:
        raise ValueError(f'reduce: "{reduce}" is not known; pass "owner" or "expert".')
    if on_lost == "renormalize":
        total = _renormalized(total, topk_idx, topk_weights, is_delivered)
    elif on_lost != "drop":
        raise ValueError(f'on_lost: "{on_lost}" is not known; pass "drop" or "renormalize".')
    return total.to(rows.dtype)


def _weighted_sum(rows: torch.Tensor, weights: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """float32 [num_tokens, hidden]: the counted choices, in their order."""
    num_tokens, num_topk, hidden = rows.shape
    total = torch.zeros(num_tokens, hidden)
    for k in range(num_topk):
        product = weights[:, k, None] * rows[:, k].float()  # rounded here,
        total = torch.where(counted[:, k, None], total + product, total)  # and rounded again here
    return total


def _sum_of_partial_sums(
    rows: torch.Tensor, weights: torch.Tensor, counted: torch.Tensor, choice_ranks: torch.Tensor
) -> torch.Tensor:
    """float32 [num_tokens, hidden]: each rank's share, rounded as it travels, by ascending rank."""
    num_tokens, _, hidden = rows.shape
    total = torch.zeros(num_tokens, hidden)
    for rank in choice_ranks[counted].unique().tolist():
        on_rank = counted & (choice_ranks == rank)
        partial = _weighted_sum(rows, weights, on_rank).to(rows.dtype)
        total = torch.where(on_rank.any(1, keepdim=True), total + partial.float(), total)
    return total


def _renormalized(
    total: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor, is_delivered: torch.Tensor
) -> torch.Tensor:
    """Scales the tokens that lost a choice; the others keep their bits."""
    wanted = _sum_of_weights(weights, topk_idx != -1)
    given = _sum_of_weights(weights, is_delivered)
    scaled = torch.where(given == 0, 0.0, total * (wanted / given))
    lost_any = ((topk_idx != -1) & ~is_delivered).any(1, keepdim=True)
    return torch.where(lost_any, scaled, total)


def _sum_of_weights(weights: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """float32 [num_tokens, 1], in the order of the choices (torch's own sum promises no order)."""
    total = torch.zeros(weights.shape[0])
    for k in range(weights.shape[1]):
        total = torch.where(counted[:, k], total + weights[:, k], total)
    return total[:, None]


def _choice_ranks(topk_idx: torch.Tensor, placement: Placement | None) -> torch.Tensor:
    """int64 [num_tokens, num_topk]: the rank that holds the expert of each choice, -1 for no expert."""
    if placement is None:
        raise ValueError("placement: this needs to know which rank holds which expert; pass a Placement.")
    expert_rank = torch.tensor([*placement.expert_rank, _NO_RANK])
    return expert_rank[topk_idx.long()]  # -1 finds the last entry


def outcome_codes(
    topk_idx: torch.Tensor, placement: Placement, active_mask: Sequence[int], lost_ranks: Collection[int] = ()
) -> torch.Tensor:
    """The outcome of each choice, when the ranks of ``lost_ranks`` did not answer in a round of this view.

    Args:
        topk_idx: ``[num_tokens, num_topk]``, -1 for no expert.
        active_mask: of the round's view, one entry per rank, 1 = active.
        lost_ranks: active ranks whose rows did not come back in this round.

    Returns:
        uint8 ``[num_tokens, num_topk]``: 0 no expert, 1 delivered, 2 lost, 3 unroutable (its rank is not in the view).
    """
    code_of_rank = [DELIVERED if active else UNROUTABLE for active in active_mask]
    for rank in lost_ranks:
        if active_mask[rank]:
            code_of_rank[rank] = LOST
    codes = torch.tensor([*code_of_rank, NONE], dtype=torch.uint8)
    return codes[_choice_ranks(topk_idx, placement)]


def moe_layer(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_rows: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    codes: torch.Tensor | None = None,
    reduce: str = "owner",
    placement: Placement | None = None,
    on_lost: str = "drop",
) -> torch.Tensor:
    """The whole layer in one process: every chosen expert over its tokens, then ``combine``.

    Args:
        x: ``[num_tokens, hidden]``.
        topk_idx, topk_weights: ``[num_tokens, num_topk]``, as for ``dispatch``.
        expert_rows: ``expert_rows(expert, x)`` computes the rows of one expert, ``[n, hidden]`` to ``[n, hidden]``.
        codes: the outcome to evaluate the layer on; ``None`` when every choice was delivered.
        reduce, placement, on_lost: as for ``combine``.

    Returns:
        ``[num_tokens, hidden]`` in the dtype of ``x``.
    """
    delivered = topk_idx != -1 if codes is None else (codes == DELIVERED) & (topk_idx != -1)
    rows = torch.zeros(*topk_idx.shape, x.shape[1], dtype=x.dtype)
    for expert in topk_idx[delivered].unique().tolist():
        token, choice = ((topk_idx == expert) & delivered).nonzero(as_tuple=True)
        rows[token, choice] = expert_rows(expert, x[token])
    return combine(rows, topk_idx, topk_weights, delivered, reduce=reduce, placement=placement, on_lost=on_lost)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """bool, the shape of both: where the elements have the same bits (-0.0 is not +0.0), or are both NaN."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ValueError(
            f"actual: {tuple(actual.shape)} {actual.dtype} cannot be compared with {tuple(expected.shape)} "
            f"{expected.dtype}; pass two tensors of one shape and dtype."
        )
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.dtype.itemsize]
    same = actual.contiguous().view(as_int) == expected.contiguous().view(as_int)
    return same | (actual.isnan() & expected.isnan()) if actual.dtype.is_floating_point else same


class Permuted(NamedTuple):
    """Rows as experts take them. ``rows``: ``[num_tokens * num_topk, hidden]``, zeros behind the last. ``offsets``:
    int32 ``[num_experts + 1]``, where each expert's rows begin and the last one's end. ``positions``: int32
    ``[num_tokens, num_topk]``, the row of each choice, -1 for one that names no expert.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    positions: torch.Tensor


def route(
    scores: torch.Tensor,
    replicas: torch.Tensor,
    expert_rank: torch.Tensor,
    active_mask: torch.Tensor,
    num_topk: int,
    first_token: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best logical experts of each token, and of each the physical expert that a live view has for it.

    Args:
        scores: float32 ``[num_tokens, num_logical]``.
        replicas: int32 ``[num_logical, max_replicas]``: the physical experts that hold each logical one. A number that
            names no physical expert is padding.
        expert_rank: int32 ``[num_physical]``: the rank of each physical expert; one on no rank is padding too.
        active_mask: int32 ``[num_ranks]``, of the view, 1 = active.
        num_topk: choices of a token.
        first_token: what the first token counts as when replicas take turns; give each rank another.

    Returns:
        ``topk_idx``: int64 ``[num_tokens, num_topk]``, physical experts, best first; -1 where no active rank holds a
        replica. ``topk_weights``: float32, the scores of the choices, of those without a replica too.

    Of equal scores the lower logical expert comes first; a NaN comes before all. Of r live replicas, token t takes
    number ``(first_token + t) % r``.
    """
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_topk]
    physical = replicas.long()
    is_live = (physical >= 0) & (physical < len(expert_rank))
    rank = expert_rank.long()[physical.where(is_live, 0)]
    is_live &= (rank >= 0) & (rank < len(active_mask))
    is_live &= active_mask[rank.where(is_live, 0)] != 0
    turn = first_token + torch.arange(len(scores))[:, None]
    turn = turn % is_live.sum(1).clamp(min=1)[chosen]
    takes = is_live[chosen] & (is_live.cumsum(1)[chosen] - 1 == turn[:, :, None])
    idx = physical[chosen].where(takes, 0).sum(2)
    return idx.where(takes.any(2), -1), scores.gather(1, chosen)


def permute(x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int) -> Permuted:
    """A row for each choice, expert by expert, within one by token, then by choice.

    Args:
        x: ``[num_tokens, hidden]``, any dtype.
        topk_idx: int64 or int32 ``[num_tokens, num_topk]``; a number outside ``0 .. num_experts - 1`` names no expert.
        num_experts: experts that rows are sorted by.
    """
    num_topk = topk_idx.shape[1]
    expert = topk_idx.long().flatten()
    names_one = (expert >= 0) & (expert < num_experts)
    order = expert.where(names_one, num_experts).argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    num_tokens = torch.bincount(expert[names_one], minlength=num_experts)
    offsets = torch.cat([num_tokens.new_zeros(1), num_tokens.cumsum(0)])
    rows = x.new_zeros(len(order), x.shape[1])
    placed = order[: int(offsets[-1])]
    rows[: len(placed)] = x[placed // num_topk]
    return Permuted(rows, offsets.int(), position.where(names_one, -1).view(topk_idx.shape).int())


def unpermute(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[num_tokens, num_topk, hidden]``: the row at each position, zeros where there is none.

    Args:
        rows: ``[num_rows, hidden]``, any dtype.
        positions: int32 ``[num_tokens, num_topk]``, as ``permute`` returns them.
    """
    is_there = (positions >= 0) & (positions < len(rows))
    out = rows.new_zeros(*positions.shape, rows.shape[1])
    out[is_there] = rows[positions[is_there].long()]
    return out


def weighted_reduce(rows: torch.Tensor, positions: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """``[num_tokens, hidden]`` in the dtype of ``rows``: ``combine``'s sum of the rows at ``positions``.

    Args:
        rows: ``[num_rows, hidden]``, bfloat16, float16 or float32.
        positions: int32 ``[num_tokens, num_topk]``; a choice without a row adds nothing.
        topk_weights: float32 ``[num_tokens, num_topk]``.
    """
    is_there = (positions >= 0) & (positions < len(rows))
    return _weighted_sum(unpermute(rows, positions), topk_weights, is_there).to(rows.dtype)


def quantize_1x128(x: torch.Tensor, scale: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as fp8 e4m3, each 128 elements (a row's last block may be shorter) with a scale of their own.

    Args:
        x: ``[num_rows, hidden]``, bfloat16, float16 or float32.
        scale: ``"float32"``, or ``"ue8m0"`` for powers of two.

    Returns:
        ``q``: float8_e4m3fn ``[num_rows, hidden]``. ``scales``: float32 ``[num_rows, num_blocks]``, or for ue8m0 int32
        ``[num_rows, ceil(num_blocks / 4)]``: one exponent byte (biased by 127) a block, the first in the lowest byte,
        unused bytes zero.

    ``scale = max(amax, 1e-4) / 448``, for ue8m0 the next power of two that is not below; ``q = e4m3(x * (1 / scale))``,
    each operation rounded to float32. A block with an infinity or a NaN is NaN as a whole (all bytes 0x7f), and so is
    its scale (ue8m0: 255).

    Raises:
        ValueError: ``x`` has not two dimensions, or ``scale`` is not known.
    """
    if x.dim() != 2:
        raise ValueError(f"x: has {x.dim()} dimensions; pass [num_rows, hidden].")
    if scale not in ("float32", "ue8m0"):
        raise ValueError(f'scale: "{scale}" is not known; pass "float32" or "ue8m0".')
    blocks = _in_blocks(x.float())
    amax = blocks.abs().amax(dim=2)
    is_finite = amax.isfinite()
    # Divided by a tensor: some devices multiply by the reciprocal of a Python number, which rounds twice.
    scales = amax.clamp(min=_SMALLEST_AMAX) / torch.full_like(amax, _E4M3_MAX)
    if scale == "ue8m0":
        bits = scales.view(torch.int32)
        exponents = (bits >> 23) + (bits & 0x7FFFFF).ne(0)
        scales = (exponents << 23).view(torch.float32)
    # Bounded, so that torch versions that saturate and those that do not give the same; no finite block needs it.
    values = (blocks * (1.0 / scales).unsqueeze(2)).clamp(-_E4M3_MAX, _E4M3_MAX)
    q = values.to(torch.float8_e4m3fn).view(torch.uint8)
    q = q.where(is_finite.unsqueeze(2), 0x7F).flatten(1)[:, : x.shape[1]].contiguous().view(torch.float8_e4m3fn)
    if scale == "float32":
        return q, scales.where(is_finite, torch.nan)
    packed = exponents.where(is_finite, 255).to(torch.uint8)
    padding = -packed.shape[1] % 4
    return q, torch.nn.functional.pad(packed, (0, padding)).contiguous().view(torch.int32)


def dequantize_1x128(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 ``[num_rows, hidden]`` of what ``quantize_1x128`` returned: ``float32(q) * scale``, rounded once."""
    blocks = _in_blocks(q.float())
    if scales.dtype == torch.int32:
        exponents = scales.contiguous().view(torch.uint8)[:, : blocks.shape[1]].double()
        # In float64, since 2**-127, the smallest scale there is, is no normal float32.
        scales = torch.exp2(exponents - 127).where(exponents != 255, torch.nan).float()
    return (blocks * scales.unsqueeze(2)).flatten(1)[:, : q.shape[1]]


def _in_blocks(wide: torch.Tensor) -> torch.Tensor:
    """[num_rows, num_blocks, 128], zeros behind the last element of a row."""
    padding = -wide.shape[1] % QUANTIZED_BLOCK
    num_blocks = (wide.shape[1] + padding) // QUANTIZED_BLOCK  # not -1: there may be no rows
    return torch.nn.functional.pad(wide, (0, padding)).view(len(wide), num_blocks, QUANTIZED_BLOCK)
