"""What each Triton kernel takes of a chip: compiled for it without a GPU, in a process that does not interpret.

``kernel_rows`` is for ``fault-a2a compile``; run as a module, this file prints the rows for one layout.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Compute capabilities as Triton names them; its own choice adds the "a" of 90a and its successors.
ARCHS = ("90", "100", "103", "120")
# AMD's, for which there is no assembly in these kernels: the portable ways beside it are taken.
AMD_ARCHS = ("gfx942", "gfx950")
VARIANTS = ("bfloat16", "float32", "float16")
TIMEOUT_S = 600
_MODULE = "fault_a2a.kernels.triton.compiled"
_WARP, _AMD_WARP = 32, 64

Row = dict[str, Any]  # kernel, arch, variant, registers, spill_bytes, shared_bytes


def kernel_rows(archs: Sequence[str] = ARCHS, variants: Sequence[str] = VARIANTS) -> list[Row]:
    """Compiles every Triton kernel for every chip of ``archs`` ("90", "gfx942" ...) and type of rows. Needs no GPU.

    Blocks, tens of seconds: a process of its own does it, since whether Triton interprets is settled at its import.

    Returns:
        one dict a kernel and chip: kernel, arch, variant, registers, spill_bytes, shared_bytes. The layout is that of
        8 ranks, 256 experts, top-8, 128 tokens of 7168 elements. ``variant`` is "all" of kernels that touch no row,
        else the type, "-fp8" behind it where rows are quantised on the way out and summed by the experts' ranks; of the
        two casts, where scales are UE8M0.

    Raises:
        ValueError: an arch or variant that is none of ``ARCHS``, ``AMD_ARCHS`` or ``VARIANTS``.
        RuntimeError: Triton is not there, or does not compile a kernel; the text says which.
    """
    for name, chosen, known in (("archs", archs, (*ARCHS, *AMD_ARCHS)), ("variants", variants, VARIANTS)):
        unknown = [one for one in chosen if one not in known]
        if unknown:
            raise ValueError(f"{name}: {unknown[0]!r} is not known; pass some of {', '.join(known)}.")
    if find_spec("triton") is None:
        raise RuntimeError("no Triton to compile its kernels; run `pip install 'fault_a2a[triton]'`.")
    rows: list[Row] = []
    for arch in archs:
        rows += _compiled("rows", arch, *variants)
    return rows


def ptx_of(kernels: Sequence[str], guards_off: int = 0) -> dict[str, str]:
    """The PTX of some kernels for one chip, by name; for tests, which ask it about scopes and roundings. Blocks.

    ``guards_off``: bits of the guards that are out, as ``layout.GUARDS`` has them; only the test build runs those.
    """
    return _compiled("ptx", ARCHS[0], VARIANTS[0], str(guards_off), *kernels)


def _compiled(*words: str) -> Any:
    """What this file prints as a module, in a process that does not interpret."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", _MODULE, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"Triton's kernels do not compile: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


# --- in the process that compiles


def _fields(dtype: str, is_quantised: bool, reduce: str) -> dict[str, Any]:
    import torch

    from fault_a2a.config import Config
    from fault_a2a.core_fields import core_fields

    dispatch_dtype = torch.float8_e4m3fn if is_quantised else None
    sizes: dict[str, Any] = {"num_experts": 256, "hidden": 7168, "num_topk": 8, "num_max_tokens_per_rank": 128}
    config = Config(**sizes, dtype=getattr(torch, dtype), dispatch_dtype=dispatch_dtype, reduce=reduce)
    return core_fields(config, num_ranks=8, rank=0)


def _constants(at: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every kernel with the constants that it is launched with."""
    from fault_a2a.kernels.triton import combine, dispatch, expand, window, words
    from fault_a2a.kernels.triton.layout import NUMBERS

    signal = {"SIGNAL": at.dispatch_signal, "SIGNAL_STEP": at.dispatch_signal_step}
    kind = {"KIND": NUMBERS["kind_dispatch_signal"]}
    wait = {"PHASE": NUMBERS["phase_dispatch_wait"], "HAS_PTX": True, "PLANT": 0}
    yield dispatch.check_choices, {"IS_64_BIT": 1}
    yield window.pass_gate, {"HAS_PTX": True}
    yield dispatch.route, {}
    yield dispatch.open_dispatch, {}
    yield dispatch.store_claims, {}
    yield dispatch.store_rows, {"HAS_SCALES": 0}
    yield window.signal, {"OPENS": words.OPENED.value, "COUNTS": words.ROWS_TO.value, **signal, **kind}
    yield window.show_phase, {}
    yield window.wait_for_words, {**signal, **kind, **wait}
    yield expand.take_headers, {}
    yield expand.rank_rows, {}
    yield expand.assign_places, {}
    yield expand.copy_rows, {"HAS_SCALES": int(at.scale_bytes > 0), "HAS_WEIGHTS": 0}
    yield window.recheck, {"KEPT": words.TAKEN.value, **signal}
    taken = {"TAKEN_AT": at.dispatch_taken, "TAKEN_STEP": at.dispatch_taken_step}
    yield window.refuse, {"KEPT": words.TAKEN.value, **taken, **kind}
    yield combine.open_answers, {}
    yield combine.return_rows, {}
    yield combine.count_answers, {}
    yield combine.reduce_rows, {}
    yield combine.tell_lost, {}
    yield from _op_constants(at)


def _op_constants(at: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The same of the operators around the verbs, in the sizes of the layout; experts have up to two replicas."""
    import torch

    from fault_a2a.kernels.triton import ops_permute, ops_quantize, ops_route

    kinds = ("bfloat16", "float16", "float32")
    dtype = getattr(torch, kinds[at.dtype])
    yield ops_route.route_tokens, ops_route.constants(at.num_experts, 2, 2 * at.num_experts, at.num_ranks, at.num_topk)
    yield ops_permute.permute_rows, ops_permute.permute_constants(at.num_topk, at.num_experts, at.hidden_bytes, True)
    yield ops_permute.unpermute_rows, ops_permute.unpermute_constants(at.hidden_bytes)
    yield ops_permute.sum_rows, ops_permute.sum_constants(at.num_topk, at.hidden, dtype)
    for kernel in (ops_quantize.quantize_blocks, ops_quantize.dequantize_blocks):
        yield kernel, ops_quantize.constants(at.hidden, dtype, is_ue8m0=at.quantize != 0)


# Numbers that do not fit into an int32 in every launch.
_TIMES = ("base_ns", "ns_per_poll", "tick_ns", "round_number", "next_round", "owed_0", "owed_1")


def _compile(kernel: Any, arch: str, constants: dict[str, Any], at: Any) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    from fault_a2a.kernels.triton.target import NUMBERS

    names = list(inspect.signature(kernel.fn).parameters)
    constants = {**({"at": at} if "at" in names else {}), **constants}
    target = GPUTarget("cuda", int(arch), _WARP) if arch in ARCHS else GPUTarget("hip", arch, _AMD_WARP)
    if "HAS_PTX" in constants:
        constants["HAS_PTX"] = target.backend == "cuda"
    small = NUMBERS.difference(_TIMES)
    types = {name: "constexpr" if name in constants else "i32" if name in small else "i64" for name in names}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False})


_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)


def _taken_of(ptx: str, arch: str) -> tuple[int, int]:
    """(registers, bytes spilled) of a kernel, as the assembler says when it turns this PTX into machine code."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = _TARGET.search(ptx)
    assert target is not None, "no target in the PTX"
    ptxas = get_ptxas(int(arch)).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        options = ("-v", "--fmad=false", f"--gpu-name={target[1]}", str(path), "-o", str(path.with_suffix(".cubin")))
        done = subprocess.run([ptxas, *options], capture_output=True, text=True)
    registers, spills = _REGISTERS.search(done.stderr), _SPILLS.search(done.stderr)
    if done.returncode != 0 or registers is None or spills is None:
        raise RuntimeError(f"{ptxas} does not assemble a kernel for {target[1]}: {done.stderr.strip()}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


_AMD_REGISTERS = re.compile(r"\.vgpr_count:\s+(\d+)")
_AMD_SPILLS = re.compile(r"\.vgpr_spill_count:\s+(\d+)")
_REGISTER_BYTES = 4


def _taken_of_amd(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes spilled) of a kernel, as its metadata says."""
    registers, spills = _AMD_REGISTERS.search(assembly), _AMD_SPILLS.search(assembly)
    assert registers is not None and spills is not None, "no metadata in the assembly"
    return int(registers[1]), int(spills[1]) * _REGISTER_BYTES


_TOUCH_ROWS = (
    *("store_rows", "copy_rows", "return_rows", "reduce_rows"),
    *("sum_rows", "quantize_blocks", "dequantize_blocks"),
)


def _compile_all(arch: str, variants: Sequence[str]) -> Iterator[Row]:
    from fault_a2a.kernels.triton.layout import layout_of

    for number, variant in enumerate(variants):
        plain = layout_of(_fields(variant, is_quantised=False, reduce="owner"))
        quantised = layout_of(_fields(variant, is_quantised=True, reduce="expert"))
        for kernel, constants in _constants(plain):
            touches = kernel.fn.__name__ in _TOUCH_ROWS
            if touches or number == 0:
                yield _row(kernel, arch, variant if touches else "all", constants, plain)
        for kernel, constants in _constants(quantised):
            if kernel.fn.__name__ in _TOUCH_ROWS:
                yield _row(kernel, arch, f"{variant}-fp8", constants, quantised)


def _row(kernel: Any, arch: str, variant: str, constants: dict[str, Any], at: Any) -> Row:
    name = kernel.fn.__name__
    try:
        compiled = _compile(kernel, arch, constants, at)
    except Exception as error:
        raise RuntimeError(f"{name} for {arch}, {variant}: {error}") from error
    text = compiled.asm
    registers, spill_bytes = _taken_of(text["ptx"], arch) if arch in ARCHS else _taken_of_amd(text["amdgcn"])
    used = {"registers": registers, "spill_bytes": spill_bytes, "shared_bytes": compiled.metadata.shared}
    return {"kernel": f"triton.{name}", "arch": arch, "variant": variant, **used}


def _ptx(arch: str, variant: str, guards_off: int, names: Sequence[str]) -> dict[str, str]:
    from fault_a2a.kernels.triton.layout import layout_of

    at = replace(layout_of(_fields(variant, is_quantised=False, reduce="owner")), guards_off=guards_off)
    chosen = [(kernel, constants) for kernel, constants in _constants(at) if kernel.fn.__name__ in names]
    return {kernel.fn.__name__: _compile(kernel, arch, constants, at).asm["ptx"] for kernel, constants in chosen}


def _main(what: str, arch: str, *words: str) -> None:
    if what == "ptx":
        print(json.dumps(_ptx(arch, words[0], int(words[1]), words[2:])))
    else:
        print(json.dumps(list(_compile_all(arch, words))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
