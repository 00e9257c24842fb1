"""Tests on the real vLLM, which `make test-vllm` installs; the plain suite leaves this folder out."""

from tests.processes import SERVER


def preload() -> None:
    """Ranks are forked from a server that has imported vLLM once: four imports at a time take a minute."""
    SERVER.set_forkserver_preload(
        [
            "tests.process_scenarios",
            "tests.vllm.micro_batches",
            "tests.vllm.arrivals",
            "tests.vllm.elastic",
            "tests.vllm.faults",
            "tests.vllm.dialects",
        ]
    )
