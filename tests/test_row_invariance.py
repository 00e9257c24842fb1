"""The row-invariance check: it passes what is invariant and finds every planted dependence on the batch."""

from __future__ import annotations

import pytest
import torch

import fault_a2a.testing
from fault_a2a.testing.row_invariance import check_row_invariant

HIDDEN = 64
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def padded_matmul(weight, num_padded=64):
    """Row-invariant: every product has the same shape."""

    def expert(x):
        outs = []
        for part in x.float().split(num_padded):
            padded = torch.zeros(num_padded, x.shape[1])
            padded[: len(part)] = part
            outs.append((padded @ weight)[: len(part)])
        return torch.cat(outs).to(x.dtype)

    return expert


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_elementwise_and_padded_experts_pass(dtype):
    experts = [lambda x: x * 2, torch.nn.functional.silu, padded_matmul(weights(HIDDEN, HIDDEN))]
    report = check_row_invariant(experts, HIDDEN, dtype)
    assert report and report.ok and report.num_changed_rows == 0, report.sentence
    assert report.sentence.startswith("3 experts kept the bits of every row") and report.num_batches > 200


def not_invariant():
    first_call = []

    def stateful(x):
        first_call.append(1)
        return x + len(first_call)

    def neighbour(x):
        return x + 0 * x.roll(1, 0)  # only a NaN or infinite neighbour shows it

    def position(x):
        return torch.where((torch.arange(len(x)) == 63)[:, None], x * 1.5, x)

    def size(x):
        return x + (0.25 if len(x) > 128 else 0.0)

    def order_of_a_sum(x):
        """The order of a sum depends on the number of rows, as in a kernel that splits its work otherwise."""
        total = torch.zeros(len(x), 1, dtype=x.dtype)
        for h in range(x.shape[1]) if len(x) % 2 else reversed(range(x.shape[1])):
            total = total + x[:, h, None]
        return total + x

    return {
        "batch mean subtracted": lambda x: x - x.mean(0),
        "state between calls": stateful,
        "neighbour touched": neighbour,
        "position": position,
        "size": size,
        "order of a sum": order_of_a_sum,
    }


@pytest.mark.parametrize("name", list(not_invariant()))
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_planted_dependence_is_found(name, dtype):
    report = check_row_invariant(not_invariant()[name], HIDDEN, dtype)
    assert not report and report.num_changed_rows > 0
    assert "is not row-invariant" in report.sentence and "check again" in report.sentence


def test_a_plain_float32_matmul_is_reported_where_it_varies():
    """What the check exists for: this machine's matrix product against itself. Says so if it happens not to vary."""
    weight = weights(1024, 1024)
    rows = weights(64, 1024)
    whole = rows @ weight
    varies = any((rows[:size] @ weight != whole[:size]).any() for size in (1, 2, 3, 4, 8, 16))
    report = check_row_invariant(lambda x: x @ weight, 1024, F32, num_shuffles=1)
    if not varies:
        pytest.skip("this machine's float32 matrix product gives a row the same bits at every batch size")
    assert not report.ok


def test_one_bad_expert_among_good_ones_is_named():
    report = check_row_invariant([lambda x: x, lambda x: x - x.mean(0)], HIDDEN)
    assert not report and report.sentence.startswith("Expert 1 is not row-invariant")


def test_same_seed_same_report():
    bad = not_invariant()["position"]
    assert check_row_invariant(bad, HIDDEN, seed=5) == check_row_invariant(bad, HIDDEN, seed=5)


def test_misuse():
    with pytest.raises(TypeError, match=r"^experts: expert 1 is 3"):
        check_row_invariant([lambda x: x, 3], HIDDEN)
    with pytest.raises(TypeError, match=r"^experts: .*; return a tensor of torch.bfloat16"):
        check_row_invariant(lambda x: x.float(), HIDDEN)
    with pytest.raises(ValueError, match=r"^experts: .*; return one row for each row"):
        check_row_invariant(lambda x: x[:1], HIDDEN)
    with pytest.raises(ValueError, match=r"^num_rows"):
        check_row_invariant(lambda x: x, HIDDEN, num_rows=1)
    with pytest.raises(ValueError, match=r"^num_shuffles"):
        check_row_invariant(lambda x: x, HIDDEN, num_shuffles=0)


def test_exports_are_lazy():
    assert fault_a2a.testing.check_row_invariant is check_row_invariant
    assert "RowInvariance" in dir(fault_a2a.testing)
    with pytest.raises(AttributeError):
        _ = fault_a2a.testing.nothing_here
