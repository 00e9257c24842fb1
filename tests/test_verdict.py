"""Who stays when ranks accuse each other: the verdict against an oracle that tries every subset, and named accidents.

Tests that stand for a guard name it: take that guard out of csrc/membership and the test goes red.
"""

import itertools
import random
import time

import pytest

from fault_a2a._core import core

REASON_BYTES = 512  # what a view carries of a reason, its end included


def ask(num_ranks, accusations, dead=(), past=None, members=None, silent=()):
    members = range(num_ranks) if members is None else members
    past = list(past or [0] * num_ranks)
    return core.verdict(num_ranks, list(members), list(dead), list(accusations), past, silent=list(silent))


def evicted_by(num_ranks, accusations, **rest):
    return ask(num_ranks, accusations, **rest)[1]


def oracle(num_ranks, accusations, dead=(), past=None, members=None, silent=()):
    """The rule read out loud: (next, evicted). Shares no idea with the search, tries every subset by size."""
    members = set(range(num_ranks) if members is None else members)
    past = past or [0] * num_ranks
    alive = sorted(members - set(dead))
    live = {(a, b) for a, b in accusations if a != b and a in alive and b in alive}
    for size in range(len(alive) + 1):
        choices = [s for s in itertools.combinations(alive, size) if all(a in s or b in s for a, b in live)]
        if choices:
            break

    def order(choice):
        num_now = sum((a in choice) + (b in choice) for a, b in live)
        num_silent = len(set(choice) & set(silent))
        return num_silent, num_now + sum(past[r] for r in choice), sorted(choice, reverse=True)

    evicted = (members & set(dead)) | set(max(choices, key=order))
    return sorted(members - evicted), sorted(evicted)


def check_against_oracle(num_ranks, accusations, **rest):
    kept, evicted, exact, reason = ask(num_ranks, accusations, **rest)
    case = f"num_ranks={num_ranks} accusations={accusations} {rest}: {reason}"
    assert (kept, evicted) == oracle(num_ranks, accusations, **rest), case
    assert exact, case
    assert reason.endswith("same members") == (not evicted) and len(reason) < REASON_BYTES, case


def all_pairs(num_ranks):
    return [(a, b) for a in range(num_ranks) for b in range(num_ranks) if a != b]


def subsets(items):
    items = list(items)
    return itertools.chain.from_iterable(itertools.combinations(items, k) for k in range(len(items) + 1))


def random_past(rng, num_ranks):
    return [rng.choice([0, 0, 1, 2, 5]) for _ in range(num_ranks)]


# --- every matrix, and many ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_matrix_with_every_dead_and_member_set(num_ranks):
    rng = random.Random(num_ranks)
    for accusations in subsets(all_pairs(num_ranks)):
        for members in subsets(range(num_ranks)):
            for dead in subsets(range(num_ranks)):
                for past in (None, random_past(rng, num_ranks), random_past(rng, num_ranks)):
                    check_against_oracle(num_ranks, accusations, dead=dead, past=past, members=members)


def test_every_matrix_of_four_ranks_with_every_dead_set():
    rng = random.Random(4)
    for accusations in subsets(all_pairs(4)):
        for dead in subsets(range(4)):
            past = random_past(rng, 4) if rng.random() < 0.5 else None
            silent = [r for r in range(4) if rng.random() < 0.3]
            check_against_oracle(4, accusations, dead=dead, past=past, silent=silent)


@pytest.mark.parametrize("num_ranks", [5, 6, 7, 8, 9])
def test_seeded_matrices(num_ranks):
    rng = random.Random(num_ranks)
    pairs = [*all_pairs(num_ranks), *((r, r) for r in range(num_ranks))]
    for _ in range(600):
        share = rng.choice([0.05, 0.1, 0.2, 0.4, 0.8])
        accusations = [pair for pair in pairs if rng.random() < share]
        dead = [r for r in range(num_ranks) if rng.random() < 0.15]
        members = [r for r in range(num_ranks) if rng.random() < 0.9]
        past = random_past(rng, num_ranks) if rng.random() < 0.6 else None
        silent = [r for r in range(num_ranks) if rng.random() < 0.3]
        check_against_oracle(num_ranks, accusations, dead=dead, past=past, members=members, silent=silent)


def test_few_sick_among_many_is_exact_beyond_the_brute_force_sizes():
    """Watches the rules that shrink the search: forced ranks, independent pieces, renumbering."""
    rng = random.Random(24)
    for _ in range(25):
        num_ranks = rng.randint(12, 24)
        sick = rng.sample(range(num_ranks), rng.randint(1, 4))
        accusations = [
            (s, other) for s in sick for other in range(num_ranks) if rng.random() < rng.choice([0.1, 0.5, 1])
        ]
        accusations = [pair if rng.random() < 0.5 else pair[::-1] for pair in accusations]
        check_against_oracle(num_ranks, accusations, past=random_past(rng, num_ranks))


# --- the accidents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sick", range(8))
def test_one_sick_rank_that_accuses_all_seven_loses(sick):
    """Guard: fewest evictions. The AND of views evicts the seven; the tie rule may not even be asked."""
    kept, evicted, exact, _ = ask(8, [(sick, other) for other in range(8)])
    assert evicted == [sick] and len(kept) == 7 and exact


@pytest.mark.parametrize("accused", range(8))
def test_a_rank_accused_by_all_goes(accused):
    assert evicted_by(8, [(other, accused) for other in range(8)]) == [accused]


@pytest.mark.parametrize("accusations", [[(4, 6), (6, 4)], [(4, 6)], [(6, 4)]])
def test_one_broken_link_costs_one_rank(accusations):
    """Guard: the tie break by rank. Without it two ends may each keep themselves."""
    assert evicted_by(8, accusations) == [6]


def test_two_broken_links_cost_two_ranks_or_their_common_end():
    assert evicted_by(8, [(4, 6), (6, 4), (1, 2), (2, 1)]) == [2, 6]
    assert evicted_by(8, [(4, 6), (6, 4), (4, 2), (2, 4)]) == [4]


def test_a_sick_rank_and_a_broken_link_cost_two():
    accusations = [(5, other) for other in range(8)] + [(4, 6), (6, 4)]
    assert evicted_by(8, accusations) == [5, 6]


@pytest.mark.parametrize("serial", range(8))
def test_a_serial_accuser_costs_at_most_one_other_rank(serial):
    """Guard: past edges. Without them an accuser of low rank outlives all the others, one an epoch."""
    members, past, lost = set(range(8)), [0] * 8, []
    while serial in members and len(members) > 1:
        victim = max(members - {serial})
        accusations = [(serial, victim)]
        kept, evicted, _, _ = ask(8, accusations, past=past, members=members)
        lost += [r for r in evicted if r != serial]
        members = set(kept)
        for end in itertools.chain.from_iterable(accusations):
            past[end] += 1
    assert len(lost) <= 1 and members


def test_past_edges_break_ties_but_never_cost_a_rank_more():
    """Guard: past edges rank below the size of the choice, and above the rank number."""
    past = [0, 0, 0, 0, 1, 0, 0, 0]
    assert evicted_by(8, [(4, 6), (6, 4)], past=past) == [4]
    infamous = [0, 9, 9, 9, 9, 9, 9, 9]
    assert evicted_by(8, [(0, other) for other in range(1, 8)], past=infamous) == [0]


def test_a_large_past_does_not_wrap():
    past = [0, 2**32 - 1, 2**32 - 1, 0, 1, 0]
    assert evicted_by(6, [(0, 1), (1, 2), (2, 3)], past=past) == [1, 2]
    assert evicted_by(2, [(0, 1), (1, 0)], past=[2**32 - 1, 0]) == [0]


@pytest.mark.parametrize("silent", [[1, 2], [0, 3], [2, 3], [1, 3]])
def test_half_that_stands_still_goes_whichever_ranks_it_has(silent):
    """Guard: silent ranks. By accusations and rank numbers alone 0 and 3 go for accusing 1 and 2, who are stopped."""
    well = [rank for rank in range(4) if rank not in silent]
    accusations = [(a, b) for a in well for b in silent]
    assert evicted_by(4, accusations, silent=silent, past=[2**32 - 1 if r in well else 0 for r in range(4)]) == silent
    assert evicted_by(4, [(0, 1), (0, 2), (3, 1), (3, 2)]) == [0, 3]


def test_silence_never_costs_a_rank_more():
    """Guard: silence ranks below the size. Whoever accuses all goes, also while beats are late."""
    assert evicted_by(8, [(3, other) for other in range(8)], silent=[0, 1, 2, 4, 5]) == [3]
    assert evicted_by(4, [(0, 1), (1, 0)], silent=[2, 3]) == [1], "of ranks that nobody accuses it means nothing"


def test_what_a_rank_wrote_before_it_died_does_not_count():
    """Guard: rows of dead ranks. A rank that accused everybody on its way down must not take a second one with it."""
    kept, evicted, _, reason = ask(8, [(3, other) for other in range(8)], dead=[3])
    assert evicted == [3] and len(kept) == 7 and reason == "rank 3 evicted: proven dead"
    # Nor may its edges weigh in a tie: 1 and 2 accuse each other, and dead 0 has accused 1.
    assert evicted_by(3, [(1, 2), (2, 1), (0, 1)], dead=[0]) == [0, 2]


def test_accusations_of_the_dead_by_the_living_do_not_count():
    """Guard: columns of dead ranks. Whoever noticed the death first would lose the next tie for it."""
    assert evicted_by(4, [(0, 3), (0, 1), (1, 0)], dead=[3]) == [1, 3]


def test_rows_of_ranks_outside_the_view_do_not_count():
    """Guard: rows of non-members. An evicted rank still writes into its own page."""
    kept, evicted, _, reason = ask(8, [(7, other) for other in range(7)], members=range(7))
    assert kept == list(range(7)) and evicted == []
    assert reason == "accusation withdrawn: same members"


def test_self_accusations_do_not_count():
    """Guard: the diagonal. Counted, it would cost rank 4 the tie, by a rank's word against itself."""
    assert evicted_by(4, [(rank, rank) for rank in range(4)]) == []
    assert evicted_by(8, [(4, 4), (4, 6), (6, 4)]) == [6]


def test_everybody_accusing_everybody_leaves_one():
    """Guard: never everybody, exact or greedy."""
    for num_ranks in (2, 5, 17, 96):
        kept, evicted, _, _ = ask(num_ranks, all_pairs(num_ranks))
        assert kept == [0] and len(evicted) == num_ranks - 1


def test_two_hosts_that_lost_each_other_split_cleanly():
    accusations = [(a, b) for a in range(8) for b in range(8, 16)]
    kept, evicted, exact, _ = ask(16, accusations + [pair[::-1] for pair in accusations])
    assert kept == list(range(8)) and evicted == list(range(8, 16)) and exact


def test_nobody_is_left_only_when_all_are_dead():
    assert ask(3, [(0, 1)], dead=[0, 1, 2])[:2] == ([], [0, 1, 2])
    assert ask(3, [(0, 1), (1, 2), (2, 0)], dead=[0, 1])[:2] == ([2], [0, 1])


# --- sizes -----------------------------------------------------------------------------------------------------------


def shapes(num_ranks, rng):
    num_sick = num_ranks // 10
    sick = rng.sample(range(num_ranks), num_sick)
    yield "a tenth sick, accusing all", [(s, other) for s in sick for other in range(num_ranks)]
    yield "a tenth sick, accusing half", [(s, o) for s in sick for o in range(num_ranks) if rng.random() < 0.5]
    yield "links broken at random", [tuple(rng.sample(range(num_ranks), 2)) for _ in range(num_ranks)]
    yield "noise everywhere", [tuple(rng.sample(range(num_ranks), 2)) for _ in range(num_ranks * 10)]
    yield "halves apart", [(a, b) for a in range(num_ranks // 2) for b in range(num_ranks // 2, num_ranks)]
    yield "rings of 25", [(r, r + 1 if r % 25 < 24 else r - 24) for r in range(num_ranks // 25 * 25)]


@pytest.mark.parametrize("num_ranks", [96, 256, 1024])
def test_large_groups_are_settled_at_once(num_ranks):
    """Prints milliseconds, the conversion of Python lists included; the limit only catches an unbounded search."""
    rng = random.Random(num_ranks)
    for name, accusations in shapes(num_ranks, rng):
        dead = rng.sample(range(num_ranks), 3)
        started = time.perf_counter()
        kept, evicted, exact, reason = ask(num_ranks, accusations, dead=dead)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        print(f"{num_ranks:5} ranks, {name}: {len(evicted)} evicted, exact={exact}, {elapsed_ms:.1f} ms")
        inside = set(kept)
        assert inside and not any(a in inside and b in inside and a != b for a, b in accusations), name
        assert sorted(kept + evicted) == list(range(num_ranks)) and set(dead) <= set(evicted), name
        opponents = {rank: set() for rank in range(num_ranks)}
        for a, b in accusations:
            opponents[a].add(b)
            opponents[b].add(a)
        # Minimal, greedy or not: whoever goes was at odds with somebody who stays.
        assert all(opponents[rank] & inside for rank in set(evicted) - set(dead)), name
        assert elapsed_ms < 2000 and len(reason) < REASON_BYTES, name
        if name.startswith("a tenth sick"):  # however many they are, the sick lose and nobody else
            assert exact and len(evicted) <= num_ranks // 10 + 3, name


def test_rings_are_exact():
    """Sixteen of them, each of which needs 13 of its 25 ranks: small pieces stay exact however many there are."""
    accusations = [(r, r + 1 if r % 25 < 24 else r - 24) for r in range(400)]
    _, evicted, exact, _ = ask(400, accusations)
    assert exact and len(evicted) == 16 * 13


def test_the_bound_holds_where_greed_is_at_its_worst():
    """Guard: the matching beside the greedy choice. By degree alone 118 witnesses go; the 40 they accuse would do."""
    num_accused, accusations, witness = 40, [], 40
    for num_each in range(2, num_accused + 1):
        for group in range(num_accused // num_each):
            accusations += [(witness, group * num_each + i) for i in range(num_each)]
            witness += 1
    kept, evicted, exact, _ = ask(witness, accusations)
    assert witness - num_accused == 118 and not exact
    assert len(evicted) <= 80 and not any(a in kept and b in kept for a, b in accusations)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_too_tangled_costs_at_most_twice_the_fewest(seed):
    """Forty ranks accuse into a crowd, each one its own witness: by the matching of witnesses 40 must go, and 40 do."""
    rng = random.Random(seed)
    accusers, crowd = range(40), range(40, 200)
    accusations = [(a, 40 + a) for a in accusers]
    accusations += [(a, other) for a in accusers for other in rng.sample(crowd, rng.randint(0, 5))]
    kept, evicted, exact, reason = ask(200, accusations)
    assert 40 <= len(evicted) <= 80
    if not exact:
        assert "at most twice as many" in reason
    assert not any(a in kept and b in kept for a, b in accusations)


# --- one answer everywhere, and one that people understand -----------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [8, 40, 96])
def test_the_order_in_which_accusations_are_read_changes_nothing(num_ranks):
    rng = random.Random(num_ranks)
    for num_edges in (3, num_ranks // 2, num_ranks * 3):
        accusations = [tuple(rng.sample(range(num_ranks), 2)) for _ in range(num_edges)]
        members, dead = list(range(num_ranks)), [1, 5]
        first = ask(num_ranks, accusations, dead=dead, members=members)
        for _ in range(5):
            again = accusations + rng.sample(accusations, 2)  # said twice is said once
            for items in (again, members, dead):
                rng.shuffle(items)
            assert ask(num_ranks, again, dead=dead, members=members) == first


def test_reasons_read_like_sentences():
    both = [(4, 6), (6, 4)]
    assert ask(8, both, dead=[3])[3] == (
        "rank 3 evicted: proven dead; "
        "rank 6 evicted: it accuses and is accused by rank 4 and the tie goes against the higher rank"
    )
    assert ask(8, [(5, other) for other in range(8)])[3] == (
        "rank 5 evicted: it accuses ranks 0-4, 6, 7, and any other choice would cost more ranks"
    )
    assert ask(8, [(4, 6)], past=[0, 0, 0, 0, 1, 0, 0, 0])[3] == (
        "rank 4 evicted: it accuses rank 6 and no equally small choice has as many accusations "
        "(here 2, 1 of them in earlier epochs)"
    )
    assert ask(16, [(a, b) for a in range(8) for b in range(8, 16)])[3] == (
        "ranks 8-15 evicted: each is accused by ranks 0-7 and the tie goes against the choice with the higher ranks"
    )
    assert ask(4, [(0, 1), (0, 2), (3, 1), (3, 2)], silent=[1, 2])[3] == (
        "ranks 1, 2 evicted: each is accused by ranks 0, 3, "
        "and no equally small choice has as many ranks that have not beaten since"
    )
    separate = [(rank, rank + 1) for rank in range(0, 60, 2)]
    assert ask(60, separate)[3].endswith("; ranks 11, 13, 15, 17 and 21 more evicted: for further accusations"), (
        "a long reason names the rest, and is not cut in the middle of a word"
    )
    assert ask(2, [], dead=[0, 1])[3] == "ranks 0, 1 evicted: proven dead; no member is left"
    assert ask(4, [])[3] == "accusation withdrawn: same members"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, [], [], [], []), "num_ranks"),
        ((1025, [], [], [], [0] * 1025), "num_ranks"),
        ((4, [4], [], [], [0] * 4), "members"),
        ((4, [0], [-1], [], [0] * 4), "proven_dead"),
        ((4, [0], [], [(0, 4)], [0] * 4), "accusations"),
        ((4, [0], [], [], [0] * 3), "past_edges"),
        ((4, [0], [], [], [0] * 4, [], [4]), "silent"),
    ],
)
def test_misuse_names_the_argument(arguments, named):
    with pytest.raises(ValueError, match=f"^{named} .*; pass "):
        core.verdict(*arguments)
