"""A name of our own, ``--all2all-backend fault_a2a``, for what vLLM goes on calling ``nixl_ep``.

Not a backend of its own: vLLM compares the name in a dozen places, and each that did not know it would take another way
in silence. So its configuration takes the name and holds ``nixl_ep``; nothing else of vLLM ever sees it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args, get_origin

NAME, SERVED_AS = "fault_a2a", "nixl_ep"
_FIELD = "all2all_backend"


def complaint(config: Any) -> str:
    """Why ``config`` (vLLM's ParallelConfig) cannot take the name; "" if it can."""
    field = getattr(config, "__dataclass_fields__", {}).get(_FIELD)
    if not dataclasses.is_dataclass(config) or field is None:
        return f"ParallelConfig has no field {_FIELD}"
    if is_taken(config):
        return ""
    names = get_args(field.type) if get_origin(field.type) is Literal else ()
    if SERVED_AS not in names or config.__annotations__.get(_FIELD) != field.type:
        return f"ParallelConfig.{_FIELD} is no list of names with {SERVED_AS!r} in it"
    if not hasattr(config, "__pydantic_validator__"):
        return "ParallelConfig is not checked by pydantic any more"
    return ""


def is_taken(config: Any) -> bool:
    return NAME in _names(config.__dataclass_fields__[_FIELD].type)


def take(config: Any) -> str:
    """Makes ``config`` take the name. Returns "", or why that failed; it is as it was then."""
    from pydantic import AfterValidator

    before = config.__dataclass_fields__[_FIELD].type
    names = (*get_args(before), NAME)
    _set(config, Annotated[Literal[names], AfterValidator(_served_name)])
    try:
        held = getattr(config(**{_FIELD: NAME}), _FIELD)
        if held == SERVED_AS:
            return ""
        why = f"ParallelConfig({_FIELD}={NAME!r}) holds {held!r}, not {SERVED_AS!r}"
    except Exception as error:  # whatever a new vLLM may raise
        why = f"ParallelConfig does not take {NAME!r} ({error})"
    _set(config, before)
    return why


def _served_name(name: str) -> str:
    return SERVED_AS if name == NAME else name


def _names(annotation: Any) -> tuple[str, ...]:
    return get_args(get_args(annotation)[0]) if get_origin(annotation) is Annotated else get_args(annotation)


def _set(config: Any, annotation: Any) -> None:
    from pydantic.dataclasses import rebuild_dataclass

    config.__annotations__[_FIELD] = annotation
    config.__dataclass_fields__[_FIELD].type = annotation
    rebuild_dataclass(config, force=True)
