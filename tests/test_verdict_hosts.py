"""A host that is cut off goes as one: the rule against an oracle that tries every subset and every host."""

import itertools
import random
import time

import pytest

from fault_a2a._core import core
from tests.test_verdict import REASON_BYTES, all_pairs, oracle, random_past, subsets


def ask(num_ranks, accusations, hosts, dead=(), past=None, members=None):
    members = range(num_ranks) if members is None else members
    past = [0] * num_ranks if past is None else past
    return core.verdict(num_ranks, list(members), list(dead), list(accusations), list(past), list(hosts))


def evicted_by(num_ranks, accusations, hosts, **rest):
    return ask(num_ranks, accusations, hosts, **rest)[1]


def oracle_with_hosts(num_ranks, accusations, hosts, dead=(), past=None, members=None):
    """The rule read out loud, on top of the rule for ranks."""
    members = set(range(num_ranks) if members is None else members)
    past = past or [0] * num_ranks
    _, evicted = oracle(num_ranks, accusations, dead=dead, past=past, members=members)
    alive = members - set(dead)
    fewest = len(set(evicted) & alive)
    live = {(a, b) for a, b in accusations if a != b and a in alive and b in alive}
    ends = set(itertools.chain.from_iterable(live))
    cut_off = []
    for host in set(hosts):
        inside = {rank for rank in alive if hosts[rank] == host}
        crosses = all((a in inside) != (b in inside) for a, b in live)
        if 2 <= len(inside) <= 2 * fewest and crosses and inside <= ends:
            num_edges = sum((a in inside) + (b in inside) for a, b in live) + sum(past[rank] for rank in inside)
            cut_off.append((len(inside), -num_edges, -max(inside), inside))
    if cut_off and fewest >= 2:
        evicted = (set(dead) & members) | min(cut_off)[3]
    return sorted(members - set(evicted)), sorted(evicted)


def check_against_oracle(num_ranks, accusations, hosts, **rest):
    kept, evicted, exact, reason = ask(num_ranks, accusations, hosts, **rest)
    case = f"num_ranks={num_ranks} accusations={accusations} hosts={hosts} {rest}: {reason}"
    assert (kept, evicted) == oracle_with_hosts(num_ranks, accusations, hosts, **rest), case
    fewest = oracle(num_ranks, accusations, **rest)[1]
    assert exact == (len(evicted) == len(fewest)) and len(evicted) <= 2 * max(len(fewest), 1), case
    assert len(reason) < REASON_BYTES and reason.endswith("same members") == (not evicted), case


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 1, 1, 0], [7, 7, 7, 3], [0, 0, 0, 0]])
def test_every_matrix_of_four_ranks_on_two_hosts(hosts):
    rng = random.Random(4)
    for accusations in subsets(all_pairs(4)):
        dead = [rank for rank in range(4) if rng.random() < 0.1]
        check_against_oracle(4, accusations, hosts, dead=dead, past=random_past(rng, 4))


@pytest.mark.parametrize("num_ranks", [6, 8, 9])
def test_seeded_matrices_across_hosts(num_ranks):
    """Mostly across one border: at random, matrices that one host explains would hardly ever come up."""
    rng, num_cut_off = random.Random(num_ranks), 0
    for _ in range(1500):
        hosts = sorted(rng.randrange(3) for _ in range(num_ranks)) if rng.random() < 0.5 else [r % 2 for r in range(9)]
        hosts = hosts[:num_ranks]
        border = rng.choice(hosts)
        across = [(a, b) for a, b in all_pairs(num_ranks) if (hosts[a] == border) != (hosts[b] == border)]
        accusations = [pair for pair in across if rng.random() < rng.choice([0.2, 0.5, 1])]
        accusations += [rng.choice(all_pairs(num_ranks))] if rng.random() < 0.2 else []
        rest = {"dead": [r for r in range(num_ranks) if rng.random() < 0.1], "past": random_past(rng, num_ranks)}
        check_against_oracle(num_ranks, accusations, hosts, **rest)
        num_cut_off += "is cut off" in ask(num_ranks, accusations, hosts, **rest)[3]
    assert num_cut_off > 100, "the rule was hardly ever asked"


def test_a_lost_path_between_two_hosts_is_one_event():
    """Guard: the host. Rank by rank 0, 5 and 6 go, and the seven that stay still have the lost path between them."""
    hosts = [0] * 4 + [1] * 4
    seen_so_far = [(0, 4), (7, 0), (1, 5), (2, 6), (6, 3), (5, 2)]
    assert evicted_by(8, seen_so_far, [0, 1, 2, 3, 4, 5, 6, 7]) == [0, 5, 6]
    kept, evicted, exact, reason = ask(8, seen_so_far, hosts)
    assert (kept, evicted, exact) == ([0, 1, 2, 3], [4, 5, 6, 7], False)
    assert reason == (
        "ranks 4-7 evicted: each is on host 1, which is cut off: every accusation crosses its border, "
        "and all its members are part of one"
    )


def test_one_sick_rank_is_not_its_host():
    """Guard: two or more. Everybody on the other host is at odds with rank 5, and only rank 5 goes."""
    assert evicted_by(8, [(5, other) for other in range(4)], [0] * 4 + [1] * 4) == [5]


def test_a_host_mate_that_is_well_clears_the_host():
    """Guard: all its members. Rank 7 is at odds with nobody, so 5 and 6 are sick and not their host."""
    accusations = [(other, sick) for sick in (5, 6) for other in range(5)]
    assert evicted_by(8, accusations, [0] * 5 + [1] * 3) == [5, 6]


def test_an_accusation_inside_clears_the_host():
    """Guard: none inside. A path that is lost outside does not make host-mates accuse each other."""
    across = [(0, 4), (1, 5), (2, 6)]
    assert evicted_by(7, across, [0] * 4 + [1] * 3) == [4, 5, 6]
    assert evicted_by(7, [*across, (4, 5)], [0] * 4 + [1] * 3) == oracle(7, [*across, (4, 5)])[1]


def test_the_smaller_host_goes():
    across = [(a, b) for a in range(6) for b in (6, 7)]
    assert evicted_by(8, across, [0] * 6 + [1] * 2) == [6, 7]
    assert evicted_by(8, [(a, b) for a in (0, 1) for b in range(2, 8)], [0] * 2 + [1] * 6) == [0, 1]


def test_a_host_of_the_dead_is_named():
    hosts = [0] * 4 + [1] * 4
    assert ask(8, [], hosts, dead=[4, 5, 6, 7])[3] == "ranks 4-7 evicted: proven dead, all of host 1"
    assert ask(8, [], hosts, dead=[1, 4, 5, 6, 7])[3] == ("ranks 1, 4-7 evicted: proven dead, among them all of host 1")
    assert ask(8, [], hosts, dead=[4, 5])[3] == "ranks 4, 5 evicted: proven dead"


@pytest.mark.parametrize("num_ranks", [96, 256])
def test_hosts_of_large_groups_are_settled_at_once(num_ranks):
    """Prints milliseconds. A border over which only some have tried their luck is as tangled as it gets."""
    rng, size = random.Random(num_ranks), 8
    hosts = [rank // size for rank in range(num_ranks)]
    victims = range(num_ranks - size, num_ranks)
    accusations = [(rng.randrange(num_ranks - size), rank) for rank in victims for _ in range(3)]
    started = time.perf_counter()
    kept, evicted, _, _ = ask(num_ranks, accusations, hosts)
    elapsed_ms = (time.perf_counter() - started) * 1e3
    print(f"{num_ranks} ranks, a host of {size} cut off: {elapsed_ms:.1f} ms")
    assert evicted == list(victims) and len(kept) == num_ranks - size and elapsed_ms < 500


def test_misuse_names_the_argument():
    with pytest.raises(ValueError, match=r"^hosts has 3 entries; pass one per rank"):
        core.verdict(4, [0], [], [], [0] * 4, [0, 0, 1])
