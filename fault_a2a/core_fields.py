"""A Config in the words of the native core, and how large a window it makes."""

from __future__ import annotations

from typing import Any

from fault_a2a._core import core
from fault_a2a.config import Config


def core_fields(config: Config, num_ranks: int, rank: int) -> dict[str, Any]:
    """The native core's form of a config on one rank."""
    placement = config.placement_for(num_ranks)
    return {
        **window_fields(config, num_ranks),
        "rank": rank,
        "dtype": str(config.dtype).removeprefix("torch."),
        "quantize": config.quantizes,
        "payload_bytes": config.payload_bytes,
        "scale_bytes": config.scale_bytes,
        "scales_at": config.scales_at,
        "weights_at_expert": config.weights_at == "expert",
        "packed": config.recv_format == "packed",
        "renormalize": config.on_lost == "renormalize",
        "expert_rank": list(placement.expert_rank),
        "expert_local": list(placement.expert_local),
        "num_local_experts": placement.num_local_experts(rank),
        "agree_by_windows": config.agreement == "windows",
        "machine": "cpu" if config.backend == "triton" else config.backend,
        "num_sms": config.num_sms or 0,
        **{name: getattr(config, name) for name in _TIMEOUTS},
    }


_TIMEOUTS = ("beat_ms", "silence_ms", "stall_ms", "link_ms", "settle_ms", "agreement_timeout_ms", "join_hold_ms")


def window_fields(config: Config, num_ranks: int) -> dict[str, int]:
    """What the size of a window follows from (see docs/protocol.md)."""
    return {
        "num_ranks": num_ranks,
        "num_experts": config.num_experts,
        "num_topk": config.num_topk,
        "num_max_tokens_per_rank": config.num_max_tokens_per_rank,
        "num_chunk_tokens": config.chunk_tokens,
        "dispatch_bytes": config.dispatch_bytes,
        "max_local_experts": config.placement_for(num_ranks).max_local_experts,
        "hidden_bytes": config.hidden_bytes,
        "num_spare_partitions": config.num_spare_partitions,
        "reduce_at_expert": int(config.reduce == "expert"),
        "max_collective_bytes": config.max_collective_bytes,
    }


def window_bytes(config: Config, num_ranks: int) -> int:
    """Bytes that one rank exports, spare partitions and its control page included, ``recv.x`` not."""
    layout = core.window_layout(window_fields(config, num_ranks))
    return int(layout["window_bytes"] + layout["control_page_bytes"])


def phases() -> list[str]:
    """The named points inside a round at which the test build can make a fault happen, in order."""
    return [phase for phase in core.phases() if not phase.startswith(_COLLECTIVE)]


def collective_phases() -> list[str]:
    """The same inside a small collective."""
    return [phase for phase in core.phases() if phase.startswith(_COLLECTIVE)]


_COLLECTIVE = "collective."
