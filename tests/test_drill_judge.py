"""The judge of a rank's steps: right rows and outcomes pass, each kind of wrong one is found."""

from __future__ import annotations

import pytest
import torch

from fault_a2a import reference
from fault_a2a.cli.drill.judge import Judge
from fault_a2a.cli.drill.model import Expectation, MoELayer, RowTable, TextBatches
from fault_a2a.placement import Placement

NUM_RANKS, NUM_TOKENS, HIDDEN, STEP, RANK = 3, 6, 32, 4, 1
ALL_ACTIVE, WITHOUT_2 = (1, 1, 1), (1, 1, 0)
TEXT = "To be, or not to be, that is the question: whether it is nobler in the mind to suffer slings and arrows."


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def expectation(request):
    batches = TextBatches(TEXT, NUM_RANKS, NUM_TOKENS)
    layer = MoELayer(batches.num_words, HIDDEN, 6, 3, dtype=request.param)
    return Expectation(batches, RowTable.build(layer), Placement.contiguous(6, NUM_RANKS))


def received(expectation, srcs=range(NUM_RANKS)):
    """(rows, sources, num_tokens) as a buffer would bring them."""
    recv = expectation.expected_recv(STEP, RANK, srcs, "packed")
    assert len(recv.sources) > 4
    return recv.x[recv.sources[:, 0].long()].clone(), recv.sources.clone(), recv.num_tokens.clone()


@pytest.mark.parametrize("srcs", [(0, 1, 2), (1,), ()])
def test_right_rows(expectation, srcs):
    rows, sources, num_tokens = received(expectation, srcs) if srcs else nothing(expectation)
    assert Judge(expectation, RANK).num_corrupt_rows(STEP, rows, sources, num_tokens) == 0


def nothing(expectation):
    empty = torch.empty(0, HIDDEN, dtype=expectation.table.x.dtype)
    return empty, torch.empty(0, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)


def plant_a_changed_bit(rows, sources, num_tokens):
    rows[3, 7] = -rows[3, 7]
    return rows, sources, num_tokens


def plant_another_step(rows, sources, num_tokens):
    return rows.roll(1, 0), sources, num_tokens


def plant_another_expert(rows, sources, num_tokens):
    sources[0, 1] = 1 - sources[0, 1]
    return rows, sources, num_tokens


def plant_a_missing_row(rows, sources, num_tokens):
    num_tokens[sources[-1, 1]] -= 1
    return rows[:-1], sources[:-1], num_tokens


def plant_a_row_twice(rows, sources, num_tokens):
    num_tokens[sources[-1, 1]] += 1
    return torch.cat([rows, rows[-1:]]), torch.cat([sources, sources[-1:]]), num_tokens


def plant_a_wrong_count(rows, sources, num_tokens):
    num_tokens[0] += 1
    return rows, sources, num_tokens


PLANTS = [
    plant_a_changed_bit,
    plant_another_step,
    plant_another_expert,
    plant_a_missing_row,
    plant_a_row_twice,
    plant_a_wrong_count,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_wrong_rows(expectation, plant):
    assert Judge(expectation, RANK).num_corrupt_rows(STEP, *plant(*received(expectation))) > 0


def codes_without(expectation, active_mask, lost_ranks=()):
    words = expectation.batches.words(STEP, RANK)
    topk_idx = expectation.table.topk_idx[words]
    return reference.outcome_codes(topk_idx, expectation.placement, active_mask, lost_ranks=lost_ranks)


@pytest.mark.parametrize("on_lost", ["drop", "renormalize"])
@pytest.mark.parametrize("reduce", ["owner", "expert"])
@pytest.mark.parametrize(("active_mask", "lost_ranks"), [(ALL_ACTIVE, ()), (ALL_ACTIVE, (2,)), (WITHOUT_2, (0,))])
def test_right_outcomes(expectation, on_lost, reduce, active_mask, lost_ranks):
    codes = codes_without(expectation, active_mask, lost_ranks)
    out = expectation.expected_out(STEP, RANK, codes, on_lost, reduce)
    accounts = Judge(expectation, RANK, on_lost, reduce).accounts(STEP, out, codes, active_mask)
    assert accounts.exact, accounts.why
    assert set(accounts.lost_on) == set(lost_ranks) and accounts.num_lost == (codes == reference.LOST).sum()
    assert accounts.num_unroutable == (codes == reference.UNROUTABLE).sum()


def judged(expectation, codes, active_mask=ALL_ACTIVE, out=None):
    out = expectation.expected_out(STEP, RANK, codes) if out is None else out
    return Judge(expectation, RANK).accounts(STEP, out, codes, active_mask)


def test_an_output_of_other_bits(expectation):
    codes = codes_without(expectation, ALL_ACTIVE)
    out = expectation.expected_out(STEP, RANK, codes)
    out[2, 5] = -out[2, 5]
    accounts = judged(expectation, codes, out=out)
    assert not accounts.exact and "tokens [2] differ from the healthy run" in accounts.why
    assert "shape" in judged(expectation, codes, out=out[:-1]).why


def test_an_output_that_holds_what_is_said_to_be_lost(expectation):
    whole = expectation.expected_out(STEP, RANK, codes_without(expectation, ALL_ACTIVE))
    accounts = judged(expectation, codes_without(expectation, ALL_ACTIVE, (2,)), out=whole)
    assert not accounts.exact and "differ from the reference on the delivered choices" in accounts.why


def test_codes_that_cannot_be(expectation):
    without_2 = codes_without(expectation, WITHOUT_2)
    assert "unroutable must be" in judged(expectation, without_2, ALL_ACTIVE).why, "a choice on an active rank"
    assert "unroutable must be" in judged(expectation, codes_without(expectation, ALL_ACTIVE), WITHOUT_2).why
    none = codes_without(expectation, ALL_ACTIVE)
    none[0, 0] = reference.NONE
    assert "a choice has no outcome" in judged(expectation, none).why
    split = codes_without(expectation, ALL_ACTIVE)
    split[0, 0] = reference.LOST
    assert "delivered some choices and lost others" in judged(expectation, split).why


@pytest.mark.parametrize("reduce", ["owner", "expert"])
def test_a_holder_that_dies_in_mid_stream_has_delivered_whole_chunks(expectation, reduce):
    codes = codes_without(expectation, ALL_ACTIVE)
    on_2 = codes_without(expectation, ALL_ACTIVE, (2,)) == reference.LOST
    tokens = on_2.any(dim=1).nonzero().flatten().tolist()
    answers = tokens if reduce == "expert" else [int(token) for token in on_2.nonzero()[:, 0]]
    assert len(tokens) >= 3 and len(answers) > 2, "rank 2 has to answer in more than one chunk"
    num_whole = 1 if reduce == "expert" else 2  # a chunk of one token has room for both experts of a rank
    first_lost = on_2.nonzero()[num_whole] if reduce == "owner" else torch.tensor([tokens[1], 0])
    after = (torch.arange(NUM_TOKENS)[:, None] > first_lost[0]) | (
        (torch.arange(NUM_TOKENS)[:, None] == first_lost[0]) & (torch.arange(3)[None] >= first_lost[1])
    )
    codes[on_2 & after] = reference.LOST
    out = expectation.expected_out(STEP, RANK, codes, "drop", reduce)
    whole = Judge(expectation, RANK, reduce=reduce).accounts(STEP, out, codes, ALL_ACTIVE)
    assert "in one round" in whole.why
    assert Judge(expectation, RANK, reduce=reduce, chunk_tokens=1).accounts(STEP, out, codes, ALL_ACTIVE).exact
    of_many = Judge(expectation, RANK, reduce=reduce, chunk_tokens=NUM_TOKENS)
    assert "in one chunk of their answers" in of_many.accounts(STEP, out, codes, ALL_ACTIVE).why
