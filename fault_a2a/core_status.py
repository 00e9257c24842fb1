"""What the native core answers when it did nothing, as the error that its caller sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fault_a2a.errors import ClosedError, QuorumLostError, RankEvictedError
from fault_a2a.log_events import tell

if TYPE_CHECKING:
    from fault_a2a.buffer import Buffer


def error_of(status: str, buffer: Buffer) -> Exception:
    """The error for every status but "ok"."""
    if status == "evicted":
        decided = buffer.views()[-1][0]
        return RankEvictedError(f"the group went on without rank {buffer.rank}: {decided.reason}.")
    if status == "quorum_lost":
        tell("quorum_lost", rank=buffer.rank, suspects=buffer.core.suspects(), epoch=buffer.view.epoch)
        return QuorumLostError(
            f"rank {buffer.rank} suspects {buffer.core.suspects()} and found no agreement on the next view "
            f"within {buffer.config.agreement_timeout_ms} ms."
        )
    if status == "closed":
        return ClosedError("this buffer is closed.")
    if status == "not_received":
        return RuntimeError("this handle's rows have not been received; call the hook that came with it first")
    if status == "open_round":
        return RuntimeError("a round or a collective is open: end it before begin_step (combine or abandon its handle)")
    if status == "third_round":
        return RuntimeError("two rounds are open: combine or abandon the older handle before the next dispatch")
    return RuntimeError(
        f"this handle's round is answered already ({status}); call the hook of its combine, or dispatch anew"
    )
