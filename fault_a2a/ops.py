"""torch.ops.fault_a2a.*: the verbs as torch operators, with fake kernels, so that compiled models can hold them."""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

import fault_a2a.row_ops  # noqa: F401  the operators that send nothing come with those that do

if TYPE_CHECKING:
    from fault_a2a.buffer import Buffer

# define and impl, not torch.library.custom_op: 4 to 5 us a call against 12.
_library = torch.library.Library("fault_a2a", "DEF")

_library.define(
    "dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, int buffer, Tensor? scales=None) -> (Tensor recv_x, "
    "Tensor num_tokens, Tensor offsets, Tensor handle, Tensor recv_scales, Tensor recv_weights)"
)
_library.define(
    "combine(Tensor y, Tensor topk_weights, Tensor handle, int buffer) -> (Tensor out, Tensor codes, Tensor lost)"
)

# Operators take no objects: an int names the buffer. Weak, so that an op never keeps a group alive.
_buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
_lock = threading.Lock()
_next_id = 1

HANDLE_WORDS = 4  # buffer id, round, num_tokens, rows received


def register(buffer: Buffer) -> int:
    """Gives a buffer the number by which operators name it. Never used twice in a process."""
    global _next_id
    with _lock:
        buffer_id, _next_id = _next_id, _next_id + 1
    _buffers[buffer_id] = buffer
    return buffer_id


def find(buffer_id: int) -> Buffer:
    buffer = _buffers.get(buffer_id)
    if buffer is None:
        raise RuntimeError(f"buffer {buffer_id} does not exist in this process; pass the id of a live Buffer")
    return buffer


def _dispatch(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, buffer: int, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    return find(buffer)._dispatch(x, topk_idx, topk_weights, scales)


def _combine(
    y: torch.Tensor, topk_weights: torch.Tensor, handle: torch.Tensor, buffer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return find(buffer)._combine(y, topk_weights, handle)


def _check_not_meta(**tensors: torch.Tensor) -> None:
    """One "meta" tensor among real ones brings a call here that was meant to send something."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on meta and holds nothing to send; give a tensor on the CPU")


def _fake_dispatch(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, buffer: int, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    owner = find(buffer)
    _check_not_meta(x=x, topk_idx=topk_idx, topk_weights=topk_weights)
    num_local, config = owner.num_local_experts, owner.config
    return (
        x.new_empty(owner.recv_shape, dtype=config.recv_dtype),
        x.new_empty([num_local], dtype=torch.int32),
        x.new_empty([num_local + 1], dtype=torch.int32),
        x.new_empty([HANDLE_WORDS], dtype=torch.int64),
        x.new_empty(owner.scales_shape, dtype=config.scale_dtype),
        x.new_empty(owner.weights_shape, dtype=torch.float32),
    )


def _fake_combine(
    y: torch.Tensor, topk_weights: torch.Tensor, handle: torch.Tensor, buffer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_not_meta(y=y, topk_weights=topk_weights, handle=handle)
    num_tokens, num_topk = topk_weights.shape
    return (
        y.new_empty([num_tokens, find(buffer).config.hidden]),
        y.new_empty([num_tokens, num_topk], dtype=torch.uint8),
        y.new_empty([], dtype=torch.bool),
    )


for _device in ("CPU", "CUDA"):
    _library.impl("dispatch", _dispatch, _device)
    _library.impl("combine", _combine, _device)
torch.library.register_fake("fault_a2a::dispatch", _fake_dispatch, lib=_library)
torch.library.register_fake("fault_a2a::combine", _fake_combine, lib=_library)
# Experts are trained elsewhere: serving only.
for _device in ("AutogradCPU", "AutogradCUDA"):
    _library.impl("dispatch", torch.library.fallthrough_kernel, _device)
    _library.impl("combine", torch.library.fallthrough_kernel, _device)


def _keep_in_order(*operators: Any) -> None:
    """A round is a meeting with the peers: no compiler may drop one whose output nobody reads, merge two with equal
    inputs, or change their order, least of all on one rank only.

    The registration is torch's own and private; where a torch does not have it, only compiled callers lose by it.
    """
    try:
        from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
    except ImportError:
        warnings.warn(
            f"torch {torch.__version__} cannot keep operators in order: do not put fault_a2a's into torch.compile",
            stacklevel=2,
        )
        return
    for operator in operators:
        _register_effectful_op(operator, _EffectType.ORDERED)


_keep_in_order(torch.ops.fault_a2a.dispatch.default, torch.ops.fault_a2a.combine.default)
