"""The modules that speak other libraries' words, without those libraries: shapes, scales, masks and refusals."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fault_a2a import Group, reference
from fault_a2a.integrations import deep_ep, nixl_ep
from fault_a2a.integrations.scale_layout import as_float32
from fault_a2a.testing.virtual import LocalFabric, run_threads

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_RANKS, NUM_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 3, 4, 256, 6, 2


def on_ranks(work: Callable[[deep_ep.Buffer], Any]) -> list[Any]:
    store, fabric = dist.HashStore(), LocalFabric()

    def one(rank: int) -> Any:
        buffer = deep_ep.Buffer(Group(store, rank, NUM_RANKS, fabric=fabric), low_latency_mode=True)
        try:
            return work(buffer)
        finally:
            buffer.destroy()

    return run_threads([partial(one, rank) for rank in range(NUM_RANKS)])


def tokens(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn([NUM_TOKENS, HIDDEN], generator=draw).bfloat16()
    topk_idx = torch.stack([torch.randperm(NUM_EXPERTS, generator=draw)[:NUM_TOPK] for _ in range(NUM_TOKENS)])
    return x, topk_idx, torch.rand([NUM_TOKENS, NUM_TOPK], generator=draw)


def expected_rows(local: torch.Tensor, rank: int, count: torch.Tensor) -> bool:
    """Rows of each expert by source rank, then token."""
    for expert in range(NUM_EXPERTS // NUM_RANKS):
        rows = []
        for source in range(NUM_RANKS):
            x, topk_idx, _ = tokens(source)
            rows += [x[t] for t in range(NUM_TOKENS) if (rank * 2 + expert) in topk_idx[t].tolist()]
        if int(count[expert]) != len(rows) or not torch.equal(local[expert, : len(rows)], torch.stack(rows)):
            return False
    return True


@pytest.mark.parametrize("hook", [False, True])
def test_rows_come_batched_and_weights_follow_with_the_combine(hook: bool) -> None:
    def work(buffer: deep_ep.Buffer) -> bool:
        x, topk_idx, weights = tokens(buffer.rank)
        counted = torch.zeros([2], dtype=torch.int32)
        rows, count, handle, event, receive = buffer.low_latency_dispatch(
            x,
            topk_idx,
            NUM_TOKENS,
            NUM_EXPERTS,
            use_fp8=False,
            return_recv_hook=hook,
            cumulative_local_expert_recv_stats=counted,
        )
        assert (receive is not None) == hook
        if receive is not None:
            receive()
        event.current_stream_wait()
        right = rows.shape == (2, NUM_RANKS * NUM_TOKENS, HIDDEN) and expected_rows(rows, buffer.rank, count)
        mine = buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
        out, _, receive = buffer.low_latency_combine(mine, topk_idx, weights, handle, return_recv_hook=hook)
        if receive is not None:
            receive()
        total = sum(weights[:, k : k + 1] * x.float() for k in range(NUM_TOPK))
        return right and torch.equal(counted, count) and torch.allclose(out.float(), total, atol=0.02, rtol=0.02)

    assert on_ranks(work) == [True] * NUM_RANKS


@pytest.mark.parametrize(("round_scale", "use_ue8m0"), [(False, False), (True, False), (True, True)])
def test_scales_come_as_they_are_asked_for(round_scale: bool, use_ue8m0: bool) -> None:
    def work(buffer: deep_ep.Buffer) -> bool:
        x, topk_idx, weights = tokens(buffer.rank)
        (rows, scales), count, handle, _, _ = buffer.low_latency_dispatch(
            x, topk_idx, NUM_TOKENS, NUM_EXPERTS, round_scale=round_scale, use_ue8m0=use_ue8m0
        )
        assert rows.dtype == torch.float8_e4m3fn
        assert scales.dtype == (torch.int32 if use_ue8m0 else torch.float32)
        assert scales.stride(1) == 1, "the rows of one scale stand next to one another"
        plain = as_float32(scales)[..., : HIDDEN // 128] if use_ue8m0 else scales
        if round_scale:
            used = torch.stack([plain[expert, : int(count[expert])].abs().log2().sum() for expert in range(2)])
            assert torch.equal(used, used.round()), "powers of two"
        wide = (rows.float().view(*rows.shape[:2], -1, 128) * plain.unsqueeze(-1)).view(rows.shape)
        buffer.low_latency_combine(wide.bfloat16(), topk_idx, weights, handle)
        kind = "ue8m0" if round_scale else "float32"
        for expert in range(2):
            want = []
            for source in range(NUM_RANKS):
                sent, idx, _ = tokens(source)
                restored = reference.dequantize_1x128(*reference.quantize_1x128(sent, scale=kind))
                want += [restored[t] for t in range(NUM_TOKENS) if (buffer.rank * 2 + expert) in idx[t].tolist()]
            if not torch.equal(wide[expert, : len(want)], torch.stack(want)):
                return False
        return True

    assert on_ranks(work) == [True] * NUM_RANKS


def test_a_masked_rank_gets_no_choices_and_with_all_masked_rounds_stay_here() -> None:
    def work(buffer: deep_ep.Buffer) -> list[bool]:
        x, topk_idx, weights = tokens(buffer.rank)
        status = torch.empty([NUM_RANKS], dtype=torch.int32)
        found = []
        others = [rank for rank in range(NUM_RANKS) if rank != buffer.rank]
        for masked in ([], [others[0]], others, []):
            for rank in range(NUM_RANKS):
                buffer.low_latency_update_mask_buffer(rank, rank in masked)
            buffer.low_latency_query_mask_buffer(status)
            rows, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, NUM_EXPERTS, use_fp8=False)
            out, _, _ = buffer.low_latency_combine(rows, topk_idx, weights, handle)
            reached = torch.tensor([[int(e) // 2 not in masked for e in row] for row in topk_idx])
            total = ((weights * reached).unsqueeze(-1) * x.float().unsqueeze(1)).sum(1)
            right = status.tolist() == [int(rank in masked) for rank in range(NUM_RANKS)]
            found.append(right and torch.allclose(out.float(), total, atol=0.02, rtol=0.02))
        return found

    assert on_ranks(work) == [[True] * 4] * NUM_RANKS


def test_what_is_not_there_is_refused_in_words() -> None:
    with pytest.raises(NotImplementedError, match="pass low_latency_mode=True"):
        deep_ep.Buffer(None)
    with pytest.raises(RuntimeError, match="call connect_ranks first"):
        nixl_ep.Buffer(rank=0).clean_mask_buffer()
    growing = nixl_ep.Buffer(rank=0, tcp_store_group=dist.HashStore())
    growing.update_memory_buffers(num_ranks=4, num_experts_per_rank=2, num_rdma_bytes=0)
    with pytest.raises(NotImplementedError, match="cannot grow"):
        growing.connect_ranks([0, 1])


def test_a_timeout_that_is_passed_counts() -> None:
    buffer = nixl_ep.Buffer(rank=0, tcp_store_group=dist.HashStore(), timeout_ms=1234)
    buffer.update_memory_buffers(num_ranks=1, num_experts_per_rank=2, num_rdma_bytes=0)
    buffer.connect_ranks([0])
    assert buffer._made.timeouts["stall_ms"] == 1234


def test_arguments_are_named() -> None:
    def work(buffer: deep_ep.Buffer) -> None:
        x, topk_idx, _ = tokens(buffer.rank)
        with pytest.raises(ValueError, match="num_experts is 7; give a multiple of the 3 ranks"):
            buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, 7)
        with pytest.raises(NotImplementedError, match="dispatch_wait_recv_cost_stats"):
            buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, 6, dispatch_wait_recv_cost_stats=x)
        with pytest.raises(ValueError, match=r"give int32 \[3\]"):
            buffer.low_latency_query_mask_buffer(torch.zeros([2], dtype=torch.int32))
        with pytest.raises(ValueError, match="rank is 3; give a number from 0 to 2"):
            buffer.low_latency_update_mask_buffer(3, True)

    on_ranks(work)
