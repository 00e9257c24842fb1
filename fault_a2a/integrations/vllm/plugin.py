"""What vLLM's plug-in loader calls: off unless asked for, and loud where vLLM is not the one it was written against.

vLLM picks its all-to-all by comparing strings and has no registry of them. So the user names the backend ``nixl_ep``,
or ``fault_a2a``, which its configuration turns into that; the two classes that vLLM looks up by name for it, when it
needs them, are these; and its workers mark step starts. Nothing else of vLLM is changed.
"""

from __future__ import annotations

import importlib
from typing import Any

from fault_a2a.integrations import settings
from fault_a2a.integrations.vllm import backend_name, touchpoints
from fault_a2a.log_events import tell


class VllmMovedError(RuntimeError):
    """This vLLM is not shaped as the integration needs it; nothing of it was changed."""


def register() -> None:
    """Puts fault_a2a into the place of vLLM's ``nixl_ep`` backend, if ``FAULT_A2A_VLLM=1``. May be called repeatedly.

    Raises:
        VllmMovedError: naming each class and signature that is not as expected, and vLLM's version.
        ValueError: a ``FAULT_A2A_*`` variable has no meaning.
    """
    if settings.ENABLED.value() != "1":
        return
    for setting in settings.ALL:
        setting.value()  # here, where the user sees it, and not in the first layer
    ours = _ours()
    replaced = [importlib.import_module(module) for module, _ in touchpoints.REPLACED]
    if all(
        getattr(module, name, None) is ours[name]
        for module, (_, name) in zip(replaced, touchpoints.REPLACED, strict=True)
    ):
        return
    found = touchpoints.complaints()
    if not found:
        found = [why for why in [backend_name.take(_vllms(touchpoints.CONFIG))] if why]
    if found:
        raise VllmMovedError(
            f"fault_a2a does not fit vLLM {touchpoints.vllm_version()}:\n  "
            + "\n  ".join(found)
            + "\nUse a vLLM that it was tested with (0.32, 0.33), or a newer fault_a2a; FAULT_A2A_VLLM=0 turns it off."
        )
    for module, (_, name) in zip(replaced, touchpoints.REPLACED, strict=True):
        setattr(module, name, ours[name])
    if settings.STEP_STARTS.value() == "1":
        from fault_a2a.integrations.vllm import steps

        steps.mark(_vllms(touchpoints.WORKER))
    tell("vllm_served")


def _vllms(place: tuple[str, str]) -> Any:
    module, name = place
    return getattr(importlib.import_module(module), name)


def _ours() -> dict[str, object]:
    # Imported late: these two import vLLM, which an API process may not have done yet.
    from fault_a2a.integrations.vllm.all2all import FaultA2AManager
    from fault_a2a.integrations.vllm.prepare_finalize import QUANT_BLOCK_SHAPE, FaultA2APrepareAndFinalize

    return {
        "NixlEPAll2AllManager": FaultA2AManager,
        "NixlEPPrepareAndFinalize": FaultA2APrepareAndFinalize,
        "NIXL_EP_QUANT_BLOCK_SHAPE": QUANT_BLOCK_SHAPE,
    }
