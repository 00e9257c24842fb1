"""The errors that a group raises; each message ends with what to do next."""

from __future__ import annotations


class FaultA2AError(RuntimeError):
    """Base of every error that tells something about the group rather than about an argument.

    Args:
        what: what happened, in a sentence or two. The class's ``next_step`` is added to it unless it is there already.

    Misuse (a wrong shape, dtype, device or order of calls) is not one of these: it is a ``ValueError``, ``TypeError``
    or plain ``RuntimeError``. And a dead peer raises nothing at all: ``combine`` reports it in its outcome.
    """

    next_step: str = "Close the buffer and look at buffer.views() and buffer.evidence() for what led here."

    def __init__(self, what: str = "") -> None:
        what = what.strip()
        # An exception that crossed a process boundary is rebuilt from its finished text: do not add the advice twice.
        text = what if what.endswith(self.next_step) else f"{_closed(what)} {self.next_step}".strip()
        super().__init__(text)


class RankEvictedError(FaultA2AError):
    """The others decided a view without this rank. Nothing this rank stores is read by them any more."""

    next_step = (
        "The other ranks go on without this one: call buffer.rejoin() to come back at a step start, "
        "or close this buffer and let a new process join."
    )


class QuorumLostError(FaultA2AError):
    """This rank cannot prove its right to go on (too few members answer), so it sent nothing."""

    next_step = "Call again later to go on if the quorum has come back, or close the buffer and start the group anew."


class ConstructError(FaultA2AError):
    """The group did not come together within ``construct_timeout_ms``, or its members do not fit each other."""

    next_step = (
        "Check that every rank starts with the same Config and reaches the same store, "
        "raise construct_timeout_ms if some ranks start late, then construct the Buffer again on every rank."
    )


class JoinError(ConstructError):
    """A process did not come into a group that runs, which goes on without it."""

    # Not its parent's: an operator who does what that says restarts every healthy rank.
    next_step = (
        "The ranks that run are not affected: leave them alone. Check that each of them calls buffer.begin_step(), and "
        "that the newcomer has their Config, store, host, user and PID namespace; then start only the newcomer again, "
        "with join=True (vLLM: FAULT_A2A_JOIN=1), or call its buffer.rejoin()."
    )


class ClosedError(FaultA2AError):
    """A call on a buffer after its ``close()``."""

    next_step = (
        "Call buffer.rejoin() to come back to a group that goes on; construct a new Buffer only together with all "
        "other ranks."
    )


def _closed(sentence: str) -> str:
    return sentence if not sentence or sentence[-1] in ".!?" else f"{sentence}."
