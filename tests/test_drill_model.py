"""The drill's work: batches of a text, a row-invariant layer, and a table that equals its direct evaluation."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fault_a2a import reference
from fault_a2a.cli.drill.model import PADDED_ROWS, Expectation, MoELayer, RowTable, TextBatches, default_ffn
from fault_a2a.placement import Placement

ROOT = Path(__file__).resolve().parents[1]
PROSE = (ROOT / "LICENSE").read_text()
TINY = "A short text, shorter than one batch."
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_layer(batches, dtype=BF16, seed=0, hidden=64, num_experts=8, num_topk=3):
    return MoELayer(batches.num_words, hidden, num_experts, num_topk, dtype=dtype, seed=seed)


# ---- the text -------------------------------------------------------------------------------------------------------
def test_words_are_numbered_by_appearance():
    batches = TextBatches("to be, or not to be", num_ranks=1, num_tokens=4)
    assert batches.vocabulary == ["to", "be", ",", "or", "not"]
    assert batches.word_idx.tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_ranks_and_steps_read_on_where_the_last_one_stopped():
    batches = TextBatches(" ".join(f"w{i}" for i in range(100)), num_ranks=3, num_tokens=4)
    read = torch.cat([batches.words(step, rank) for step in range(8) for rank in range(3)])
    assert (read.diff() % 100 == 1).all() and len(read) == 96
    assert batches.step_words(5).tolist() == [batches.words(5, rank).tolist() for rank in range(3)]


def test_every_lap_reads_the_whole_text_from_another_place():
    """A text of exactly one step's tokens: the steps must differ, or a stale row would pass for a right one."""
    batches = TextBatches(" ".join(f"w{i}" for i in range(24)), num_ranks=3, num_tokens=8)
    laps = [batches.step_words(step).flatten() for step in range(10)]
    assert all(lap.sort().values.equal(torch.arange(24)) for lap in laps)
    assert len({lap[0].item() for lap in laps}) > 5
    assert all(not a.equal(b) for a, b in itertools.pairwise(laps))


@pytest.mark.parametrize("text", [TINY, "x", "?!"])
def test_a_text_shorter_than_a_batch(text):
    batches = TextBatches(text, num_ranks=8, num_tokens=64)
    for step in (0, 1, 10**6):
        words = batches.step_words(step)
        assert words.shape == (8, 64) and words.min() >= 0 and words.max() < batches.num_words
        assert len(words.unique()) == batches.num_words


def test_seed_moves_the_start_and_nothing_else():
    a, b, again = (TextBatches(PROSE, 8, 64, seed=seed) for seed in (0, 1, 0))
    assert a.step_words(3).equal(again.step_words(3)) and not a.step_words(3).equal(b.step_words(3))
    assert a.vocabulary == b.vocabulary
    assert TextBatches(PROSE, 8, 64, seed=-(2**70)).step_words(0).shape == (8, 64)


def test_a_large_vocabulary_is_folded():
    batches = TextBatches(PROSE, 2, 8, max_words=10)
    assert batches.num_words == 10 and batches.word_idx.max() == 9
    unfolded = TextBatches(PROSE, 2, 8)
    assert unfolded.num_words > 100 and batches.word_idx.equal(unfolded.word_idx % 10)


def test_no_tokens():
    assert TextBatches(TINY, 2, 0).step_words(3).shape == (2, 0)


def test_text_refusals():
    with pytest.raises(ValueError, match=r"^text: "):
        TextBatches(" \n ", 1, 1)
    with pytest.raises(ValueError, match=r"^num_ranks 0"):
        TextBatches(TINY, 0, 1)
    with pytest.raises(ValueError, match=r"rank 2: pass"):
        TextBatches(TINY, 2, 1).words(0, 2)


# ---- the layer ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_routing(dtype):
    batches = TextBatches(PROSE, 8, 64)
    layer = small_layer(batches, dtype)
    topk_idx, weights = layer.route(layer.embed(batches.words(0, 0)))
    assert topk_idx.dtype == torch.int64 and weights.dtype == F32 and topk_idx.shape == weights.shape == (64, 3)
    assert all(len(set(line)) == 3 for line in topk_idx.tolist()), "different experts"
    assert topk_idx.min() >= 0 and topk_idx.max() < 8
    assert ((weights.sum(1) - 1).abs() < 1e-6).all() and (weights > 0).all() and (weights.diff(dim=1) <= 0).all()


def test_routing_has_the_skew_and_the_repeats_of_a_text():
    batches = TextBatches(PROSE, 8, 64)
    layer = MoELayer(batches.num_words, 256, 32, 4)
    words = torch.cat([batches.step_words(step).flatten() for step in range(4)])
    topk_idx, weights = layer.route(layer.embed(words))
    load = torch.bincount(topk_idx.flatten(), minlength=32).float()
    assert load.max() > 1.5 * load.mean(), "some experts are busier"
    assert load.min() < 0.7 * load.mean(), "and some are idler"
    repeats = torch.bincount(words).max()
    assert repeats > 0.02 * len(words), "a common word comes again and again"
    for word in words.unique()[:50]:
        same = words == word
        assert (topk_idx[same] == topk_idx[same][0]).all() and (weights[same] == weights[same][0]).all()
    assert (weights[:, 0] > 1.2 * weights[:, -1]).float().mean() > 0.5, "the weights of a token differ"


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rows_are_invariant_and_the_layer_says_so(dtype):
    layer = small_layer(TextBatches(PROSE, 8, 64), dtype, hidden=256)
    report = layer.row_invariance(expert=2)
    assert report.ok, report.sentence


def test_a_layer_that_mixes_rows_is_reported(monkeypatch):
    layer = small_layer(TextBatches(PROSE, 8, 64))
    padded_parts = layer._in_padded_parts
    monkeypatch.setattr(layer, "_in_padded_parts", lambda x, *rest: padded_parts(x, *rest) + x.float().mean(0))
    assert not layer.row_invariance()


def test_swiglu_computes_what_it_says():
    layer = MoELayer(10, 32, 2, 1, ffn=16, dtype=F32)
    weights = layer._weights(1)
    x = layer.embedding
    gate, up = (x @ weights.gate_up).split(16, dim=1)
    assert torch.allclose(layer.expert_rows(1, x), (gate * gate.sigmoid() * up) @ weights.down, atol=1e-5)
    bf16 = MoELayer(10, 32, 2, 1, ffn=16, dtype=BF16)
    assert bf16.expert_rows(1, x.to(BF16)).dtype == BF16
    assert bf16._weights(1).down.equal(bf16._weights(1).down.to(BF16).float()), "weights that bfloat16 can hold"


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_any_number_of_rows(count):
    layer = MoELayer(300, 32, 2, 1)
    together = layer.expert_rows(0, layer.embedding[:count])
    assert together.shape == (count, 32)
    one_by_one = [layer.expert_rows(0, layer.embedding[row : row + 1]) for row in range(count)]
    assert reference.same_bits(together, torch.cat([together[:0], *one_by_one])).all()


def test_experts_differ_and_each_rank_builds_only_its_own():
    layer, other = MoELayer(20, 32, 8, 2, seed=3), MoELayer(20, 32, 8, 2, seed=3)
    layer.prepare([5])
    assert list(layer._experts) == [5]
    other.prepare(range(8))
    x = layer.embedding
    assert layer.expert_rows(5, x).equal(other.expert_rows(5, x))
    assert not other.expert_rows(4, x).equal(other.expert_rows(5, x))
    assert not MoELayer(20, 32, 8, 2, seed=4).expert_rows(5, x).equal(other.expert_rows(5, x))
    with pytest.raises(ValueError, match=r"^expert: 8"):
        layer.expert_rows(8, x)


def test_layer_refusals():
    with pytest.raises(ValueError, match=r"^num_topk: 3"):
        MoELayer(5, 8, 2, 3)
    with pytest.raises(ValueError, match=r"hidden"):
        MoELayer(5, 0, 2, 1)
    assert default_ffn(8) == 8 and default_ffn(1024) == 64 and default_ffn(16384) == 128


def test_received_rows_of_both_formats():
    """NaN behind the last row of an expert and in idle experts is never read into a row."""
    layer = MoELayer(400, 32, 6, 2)
    local_experts, num_tokens = (1, 3, 5), torch.tensor([70, 0, 3], dtype=torch.int32)
    packed = layer.embedding[:73]
    offsets = torch.tensor([0, 70, 70, 73], dtype=torch.int32)
    batched = torch.full((3, 80, 32), torch.nan, dtype=BF16)
    batched[0, :70], batched[2, :3] = packed[:70], packed[70:]
    got_packed = layer.recv_rows(packed, num_tokens, local_experts, offsets)
    got_batched = layer.recv_rows(batched, num_tokens, local_experts)
    want = torch.cat([layer.expert_rows(1, packed[:70]), layer.expert_rows(5, packed[70:])])
    assert got_packed.equal(want) and torch.cat([got_batched[0, :70], got_batched[2, :3]]).equal(want)
    assert list(layer._experts) == [1, 5], "an expert without rows is not even built"


# ---- the table ------------------------------------------------------------------------------------------------------
def make_drill(text, dtype, num_ranks=3, num_tokens=20, **sizes):
    batches = TextBatches(text, num_ranks, num_tokens, seed=1)
    layer = small_layer(batches, dtype, seed=1, **sizes)
    return (
        batches,
        layer,
        Expectation(batches, RowTable.build(layer), Placement.contiguous(layer.num_experts, num_ranks)),
    )


@pytest.mark.parametrize("text", [PROSE, TINY], ids=["prose", "tiny"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("reduce", ["owner", "expert"])
def test_table_equals_direct_evaluation_in_any_batch(text, dtype, reduce):
    """Tokens of one rank, of all ranks and of several steps at once, through the layer itself: the same bits."""
    batches, layer, expectation = make_drill(text, dtype)
    options = {"reduce": reduce, "placement": expectation.placement}
    for steps, ranks in [([4], [1]), ([4], [0, 1, 2]), (range(6), [2, 0, 1])]:
        words = torch.cat([batches.words(step, rank) for step in steps for rank in ranks])
        x = layer.embed(words)
        out = reference.moe_layer(x, *layer.route(x), layer.expert_rows, **options)
        looked_up = [expectation.healthy_out(step, rank, reduce) for step in steps for rank in ranks]
        assert reference.same_bits(out, torch.cat(looked_up)).all()
    assert out.float().abs().max() > 0.1 and len(words) > PADDED_ROWS


@pytest.mark.parametrize("on_lost", ["drop", "renormalize"])
def test_expected_out_on_an_outcome(on_lost):
    batches, layer, expectation = make_drill(PROSE, BF16)
    words = batches.words(7, 2)
    x = layer.embed(words)
    topk_idx, weights = layer.route(x)
    codes = reference.outcome_codes(topk_idx, expectation.placement, (1, 0, 1), lost_ranks=[2])
    assert set(codes.flatten().tolist()) == {1, 2, 3}
    want = reference.moe_layer(x, topk_idx, weights, layer.expert_rows, codes=codes, on_lost=on_lost)
    assert reference.same_bits(expectation.expected_out(7, 2, codes, on_lost), want).all()
    assert not reference.same_bits(expectation.healthy_out(7, 2), want).all()


@pytest.mark.parametrize("recv_format", ["batched", "packed"])
@pytest.mark.parametrize("text", [PROSE, TINY], ids=["prose", "tiny"])
def test_a_whole_round_by_hand(recv_format, text):
    """Dispatch, experts rank by rank, combine: what the drill's processes do, with rank 1 dead."""
    batches, layer, expectation = make_drill(text, BF16)
    placement, alive, step = expectation.placement, [0, 2], 11
    rows = torch.full((3, 20, 3, 64), torch.nan, dtype=BF16)
    for rank in alive:
        recv = expectation.expected_recv(step, rank, alive, recv_format, 20)
        flat = recv.x.reshape(-1, 64)
        row = recv.sources[:, 0].long()
        assert reference.same_bits(flat[row], expectation.expected_x(step, recv.sources)).all()
        local = torch.tensor(placement.local_experts(rank))[recv.sources[:, 1].long()]
        assert expectation.expected_experts(step, recv.sources).equal(local)
        offsets = recv.offsets if recv_format == "packed" else None
        y = layer.recv_rows(recv.x, recv.num_tokens, placement.local_experts(rank), offsets).reshape(-1, 64)
        _, _, src, token, choice = recv.sources.long().unbind(1)
        rows[src, token, choice] = y[row]
    for rank in alive:
        topk_idx, weights = layer.route(layer.embed(batches.words(step, rank)))
        codes = reference.outcome_codes(topk_idx, placement, [1, 1, 1], [1])
        out = reference.combine(rows[rank], topk_idx, weights, codes)
        assert reference.same_bits(out, expectation.expected_out(step, rank, codes)).all() and not out.isnan().any()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_table_through_files(dtype, tmp_path):
    _, _, expectation = make_drill(PROSE, dtype)
    expectation.table.save(tmp_path)
    loaded = RowTable.load(tmp_path)
    for name in ("x", "topk_idx", "topk_weights", "rows"):
        built, mapped = getattr(expectation.table, name), getattr(loaded, name)
        assert mapped.dtype == built.dtype and mapped.equal(built)
    loaded.rows.zero_()
    assert RowTable.load(tmp_path).rows.equal(expectation.table.rows), "nobody changes what the others see"


FINGERPRINT = """
import hashlib, sys, torch
from fault_a2a.cli.drill.model import MoELayer, RowTable, TextBatches
batches = TextBatches(open(sys.argv[1]).read(), 3, 20, seed=1)
layer = MoELayer(batches.num_words, 64, 8, 3, dtype=torch.float32, seed=1)
layer.prepare(reversed(range(8)))
table, digest = RowTable.build(layer), hashlib.sha256(batches.step_words(5).numpy().tobytes())
for tensor in (table.x, table.topk_idx, table.topk_weights, table.rows):
    digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_another_process_computes_the_same_bits():
    """In another order of building the experts, and with another thread count to begin with."""
    command = [sys.executable, "-c", FINGERPRINT, str(ROOT / "LICENSE")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    batches, _, expectation = make_drill(PROSE, F32)
    digest = hashlib.sha256(batches.step_words(5).numpy().tobytes())
    for name in ("x", "topk_idx", "topk_weights", "rows"):
        digest.update(getattr(expectation.table, name).numpy().tobytes())
    assert digest.hexdigest() == other
