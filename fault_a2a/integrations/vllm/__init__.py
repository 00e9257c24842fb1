"""fault_a2a under vLLM's MoE layer: ``register`` is the entry point that vLLM calls in each of its processes."""

from fault_a2a.integrations.vllm.plugin import VllmMovedError, register

__all__ = ["VllmMovedError", "register"]
