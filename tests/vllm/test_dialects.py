"""vLLM's own NIXL EP and DeepEP classes, unmodified, over fault_a2a in real processes, one of which is killed."""

from dataclasses import replace

import pytest

from tests.vllm import preload
from tests.vllm.dialects import by_deep_ep_dialect, by_nixl_dialect, deep_ep_manager_knows, nixl_manager_knows
from tests.vllm.layers import Layer
from tests.vllm.scenarios import Death, Steps
from tests.vllm.test_layers import run

preload()

# The smallest size on vLLM's own list.
LAYER = Layer(hidden=2048, num_max_tokens=8)


@pytest.mark.parametrize("death", [None, Death()], ids=["healthy", "one killed"])
def test_vllms_own_nixl_classes_survive_a_kill(death: Death | None) -> None:
    run(Steps(LAYER, by_nixl_dialect, death, asks=nixl_manager_knows))


@pytest.mark.parametrize("quantized", ["float32", "ue8m0"])
def test_vllms_own_nixl_classes_in_fp8(quantized: str) -> None:
    run(Steps(replace(LAYER, quantized=quantized), by_nixl_dialect, Death(), asks=nixl_manager_knows))


@pytest.mark.parametrize("quantized", ["", "float32", "ue8m0"])
def test_vllms_own_deep_ep_classes_survive_a_kill(quantized: str) -> None:
    layer = replace(LAYER, quantized=quantized)
    run(Steps(layer, by_deep_ep_dialect, Death(phase="combine.half_signalled"), asks=deep_ep_manager_knows))
