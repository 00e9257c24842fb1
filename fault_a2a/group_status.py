"""The state of a group as JSON, in the shape of vLLM's ``GET /fault_tolerance/status``."""

from __future__ import annotations

from typing import Any

from fault_a2a.buffer import Buffer
from fault_a2a.membership import View

SCHEMA_VERSION = 1


def status(buffer: Buffer) -> dict[str, Any]:
    """What this rank knows of every rank. Does not block, asks nobody.

    Returns:
        ``{"schema_version", "total_engines", "engines": [{"id", "status", "fault_info"}]}``: an engine a rank,
        "healthy", "unhealthy" (suspected, and the group has not decided) or "dead" (not in the view); ``fault_info``
        is a sentence, and only there if the engine is not healthy.
    """
    views = [view for view, _ in buffer.views()]
    suspects = set(buffer.core.suspects())
    kinds = {one.rank: one.kind for one in buffer.evidence()}
    return {
        "schema_version": SCHEMA_VERSION,
        "total_engines": buffer.num_ranks,
        "engines": [_engine(rank, views, suspects, kinds) for rank in range(buffer.num_ranks)],
    }


def _engine(rank: int, views: list[View], suspects: set[int], kinds: dict[int, str]) -> dict[str, Any]:
    if not views[-1].active_mask[rank]:
        # The view in which it went, for the last time.
        went = next(
            after for before, after in zip(views[-2::-1], views[:0:-1], strict=True) if before.active_mask[rank]
        )
        return {"id": rank, "status": "dead", "fault_info": f"epoch {went.epoch}: {went.reason}"}
    if rank in suspects:
        return {"id": rank, "status": "unhealthy", "fault_info": f"suspected: {kinds.get(rank, 'stall')}"}
    return {"id": rank, "status": "healthy"}
