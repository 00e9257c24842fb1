"""torch.ops.fault_a2a.*, those that send nothing: what a layer does around the verbs, each on one rank alone.

    topk_idx, topk_weights = route(scores, replicas, expert_rank, active_mask, num_topk, first_token=0)
    rows, offsets, positions = permute(x, topk_idx, num_experts)
    chosen = unpermute(rows, positions)
    out = weighted_reduce(rows, positions, topk_weights)
    q, scales = quantize_1x128(x, scale="float32")
    x = dequantize_1x128(q, scales, dtype=None)

Shapes, dtypes and meaning of each stand with its namesake in ``fault_a2a.reference``, and so do the bits; the one more
argument, ``dtype`` of ``dequantize_1x128``, rounds the float32 product once more. On a CPU each is that reference, or
the core where it is faster; on a GPU a Triton kernel, which has run in Triton's interpreter and not on a GPU. They do
not block and are not collective. No shape depends on what a tensor holds, so that a graph may capture them. Tensors are
contiguous and on one device; what is not raises a ValueError or TypeError that names the argument. No gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fault_a2a import reference
from fault_a2a._core import core
from fault_a2a.checks import INDEX_DTYPES, check_form
from fault_a2a.config import DTYPES, MAX_NUM_EXPERTS, MAX_NUM_RANKS, SCALE_BLOCK

SCALES = ("float32", "ue8m0")
E4M3 = torch.float8_e4m3fn
INT32, FLOAT32 = (torch.int32,), (torch.float32,)


def _check(wanted: dict[str, tuple[torch.Tensor, tuple[torch.dtype, ...], Sequence[int | str]]]) -> None:
    first = next(iter(wanted))
    device = wanted[first][0].device
    for name, (tensor, dtypes, shape) in wanted.items():
        check_form(name, tensor, dtypes, shape)
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {device}; give {name}.to('{device}')")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; give {least} to {most}")


# --- each operator: its checks, which answer with the shapes and dtypes of what it returns


def _shape_of_route(
    scores: torch.Tensor,
    replicas: torch.Tensor,
    expert_rank: torch.Tensor,
    active_mask: torch.Tensor,
    num_topk: int,
    first_token: int = 0,
) -> tuple[torch.Tensor, ...]:
    _check(
        {
            "scores": (scores, FLOAT32, ["num_tokens", "num_logical"]),
            "replicas": (replicas, INT32, [scores.shape[-1], "max_replicas"]),
            "expert_rank": (expert_rank, INT32, ["num_physical"]),
            "active_mask": (active_mask, INT32, ["num_ranks"]),
        }
    )
    num_tokens, num_logical = scores.shape
    for name, tensor, most in (
        ("scores", scores, MAX_NUM_EXPERTS),
        ("replicas", replicas, MAX_NUM_RANKS),
        ("expert_rank", expert_rank, MAX_NUM_EXPERTS),
        ("active_mask", active_mask, MAX_NUM_RANKS),
    ):
        _check_range(f"the last size of {name}", tensor.shape[-1], 1, most)
    _check_range("num_topk", num_topk, 1, num_logical)
    _check_range("first_token", first_token, 0, 1 << 30)
    return (
        scores.new_empty([num_tokens, num_topk], dtype=torch.int64),
        scores.new_empty([num_tokens, num_topk]),
    )


def _shape_of_permute(x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    _check(
        {
            "x": (x, (x.dtype,), ["num_tokens", "hidden"]),
            "topk_idx": (topk_idx, INDEX_DTYPES, [x.shape[0], "num_topk"]),
        }
    )
    _check_range("num_experts", num_experts, 1, MAX_NUM_EXPERTS)
    num_tokens, num_topk = topk_idx.shape
    _check_range("the last size of x", x.shape[1], 1, 1 << 30)
    _check_range("the last size of topk_idx", num_topk, 1, MAX_NUM_EXPERTS)
    return (
        x.new_empty([num_tokens * num_topk, x.shape[1]]),
        x.new_empty([num_experts + 1], dtype=torch.int32),
        x.new_empty([num_tokens, num_topk], dtype=torch.int32),
    )


def _shape_of_unpermute(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    _check(
        {
            "rows": (rows, (rows.dtype,), ["num_rows", "hidden"]),
            "positions": (positions, INT32, ["num_tokens", "num_topk"]),
        }
    )
    _check_range("the last size of rows", rows.shape[1], 1, 1 << 30)
    return rows.new_empty([*positions.shape, rows.shape[1]])


def _shape_of_weighted_reduce(rows: torch.Tensor, positions: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    _check(
        {
            "rows": (rows, DTYPES, ["num_rows", "hidden"]),
            "positions": (positions, INT32, ["num_tokens", "num_topk"]),
            "topk_weights": (topk_weights, FLOAT32, list(positions.shape)),
        }
    )
    _check_range("the last size of rows", rows.shape[1], 1, 1 << 30)
    return rows.new_empty([positions.shape[0], rows.shape[1]])


def _shape_of_quantize(x: torch.Tensor, scale: str = "float32") -> tuple[torch.Tensor, ...]:
    _check({"x": (x, DTYPES, ["num_rows", "hidden"])})
    _check_range("the last size of x", x.shape[1], 1, 1 << 30)
    if scale not in SCALES:
        raise ValueError(f'scale is "{scale}"; give "float32" or "ue8m0"')
    dtype = torch.int32 if scale == "ue8m0" else torch.float32
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty([x.shape[0], _num_scales(x.shape[1], dtype)], dtype=dtype)


def _shape_of_dequantize(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    _check({"q": (q, (E4M3,), ["num_rows", "hidden"])})
    _check_range("the last size of q", q.shape[1], 1, 1 << 30)
    num_scales = _num_scales(q.shape[1], scales.dtype)
    _check({"q": (q, (E4M3,), q.shape), "scales": (scales, (*FLOAT32, *INT32), [q.shape[0], num_scales])})
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype}; give {' or '.join(map(str, DTYPES))}")
    return q.new_empty(q.shape, dtype=dtype or torch.float32)


def _num_scales(hidden: int, dtype: torch.dtype) -> int:
    """One float32 a block, or four UE8M0 bytes in each int32."""
    num_blocks = -(-hidden // SCALE_BLOCK)
    return -(-num_blocks // 4) if dtype == torch.int32 else num_blocks


# --- on a CPU


def _quantize(x: torch.Tensor, scale: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """In the core: the same bits as the reference, without a pass for each step of it."""
    q, scales = _shape_of_quantize(x, scale)
    name = str(x.dtype).removeprefix("torch.")
    core.quantize_rows(name, scale, q.data_ptr(), scales.data_ptr(), x.data_ptr(), *x.shape)
    return q, scales


def _dequantize(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return reference.dequantize_1x128(q, scales).to(dtype or torch.float32)


# --- registration

_library = torch.library.Library("fault_a2a", "FRAGMENT")


def _on_a_gpu(file: str, name: str) -> Callable[..., Any]:
    def call(first: torch.Tensor, *others: Any) -> Any:
        try:
            kernels = importlib.import_module(f"fault_a2a.kernels.triton.{file}")
        except ImportError as error:
            raise ImportError(
                f"fault_a2a::{name} on a GPU needs Triton; run `pip install 'fault_a2a[triton]'`, or give CPU tensors"
            ) from error
        if importlib.import_module("fault_a2a.kernels.triton.target").INTERPRETED:
            raise RuntimeError(f"fault_a2a::{name}: TRITON_INTERPRET=1 runs kernels on the CPU; unset it for a GPU")
        with torch.cuda.device(first.device):
            return getattr(kernels, name)(first, *others)

    return call


def _register(schema: str, file: str, shape_of: Callable[..., Any], on_a_cpu: Callable[..., Any]) -> None:
    """An operator that checks its arguments wherever it runs, tracing included."""
    name = schema[: schema.index("(")]
    on_a_gpu = _on_a_gpu(file, name)

    def checked(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            shape_of(*args)
            return run(*args)

        return call

    _library.define(schema)
    _library.impl(name, checked(on_a_cpu), "CPU")
    _library.impl(name, checked(on_a_gpu), "CUDA")
    torch.library.register_fake(f"fault_a2a::{name}", shape_of, lib=_library)
    for key in ("AutogradCPU", "AutogradCUDA"):  # serving only, as the verbs
        _library.impl(name, torch.library.fallthrough_kernel, key)


_register(
    "route(Tensor scores, Tensor replicas, Tensor expert_rank, Tensor active_mask, int num_topk, int first_token=0) "
    "-> (Tensor topk_idx, Tensor topk_weights)",
    "ops_route",
    _shape_of_route,
    reference.route,
)
_register(
    "permute(Tensor x, Tensor topk_idx, int num_experts) -> (Tensor rows, Tensor offsets, Tensor positions)",
    "ops_permute",
    _shape_of_permute,
    reference.permute,
)
_register("unpermute(Tensor rows, Tensor positions) -> Tensor", "ops_permute", _shape_of_unpermute, reference.unpermute)
_register(
    "weighted_reduce(Tensor rows, Tensor positions, Tensor topk_weights) -> Tensor",
    "ops_permute",
    _shape_of_weighted_reduce,
    reference.weighted_reduce,
)
_register(
    'quantize_1x128(Tensor x, str scale="float32") -> (Tensor q, Tensor scales)',
    "ops_quantize",
    _shape_of_quantize,
    _quantize,
)
_register(
    "dequantize_1x128(Tensor q, Tensor scales, ScalarType? dtype=None) -> Tensor",
    "ops_quantize",
    _shape_of_dequantize,
    _dequantize,
)
