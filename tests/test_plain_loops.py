"""The row loops for the oldest x86-64 and for other compilers give the bits of the ones that run here.

The build chooses a version of each loop by the machine, so that on a new one the plain version never runs.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fault_a2a._core import core
from tests.test_fp8 import DTYPES, E4M3, cast, name_of, quantize, same_scales, some_rows, structured_floats
from tests.test_rows import HIDDENS, assert_same, in_torch, narrow, widen, wild_rows

ROOT = Path(__file__).resolve().parent.parent
SHIM = """
#include "kernels/cpu/quantize.hpp"
#include "kernels/cpu/rows.hpp"
using namespace fa2a;
extern "C" {
void sum(u32 dtype, u8* out, const u8* const* rows, const float* weights, i32 num_rows, i32 hidden, float factor) {
  weighted_sum(static_cast<DType>(dtype), out, rows, weights, num_rows, hidden, factor, false);
}
void widen(u32 dtype, float* out, const u8* row, i32 hidden) { widen_row(static_cast<DType>(dtype), out, row, hidden); }
void narrow(u32 dtype, u8* row, const float* in, i32 hidden) { store_row(static_cast<DType>(dtype), row, in, hidden); }
void quantize(u32 dtype, u32 format, u8* q, u8* scales, const u8* x, i32 hidden) {
  quantize_row(static_cast<DType>(dtype), static_cast<ScaleFormat>(format), q, scales, x, hidden);
}
void cast(u8* q, const float* x, i32 count) { cast_row_to_e4m3(q, x, count); }
}
"""
# The order of enum DType and of enum ScaleFormat.
DTYPE_CODES = {"bfloat16": 0, "float32": 1, "float16": 2}
SCALE_CODES = {"float32": 0, "ue8m0": 1}


@pytest.fixture(scope="module", params=[("g++", "-O3"), ("g++", "-O0"), ("clang++", "-O2"), ("clang++-14", "-O2")])
def plain(request, tmp_path_factory):
    compiler, level = request.param
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    folder = tmp_path_factory.mktemp("plain")
    (folder / "shim.cpp").write_text(SHIM)
    sources = [str(folder / "shim.cpp"), *(str(ROOT / "kernels/cpu" / f"{name}.cpp") for name in ("rows", "quantize"))]
    options = ["-std=c++17", level, "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    options += ["-DFA2A_PLAIN_LOOPS", f"-I{ROOT}", f"-I{ROOT / 'csrc'}", "-o", str(folder / "plain.so")]
    done = subprocess.run([compiler, *options, *sources], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "plain.so"))


def at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_sum(plain, dtype):
    for hidden in HIDDENS:
        rows, weights = wild_rows(hidden, 8, hidden, dtype)
        out = torch.empty(hidden, dtype=dtype)
        row_pointers = (ctypes.c_void_p * 8)(*(row.data_ptr() for row in rows))
        in_c = (ctypes.c_float * 8)(*weights)
        plain.sum(DTYPE_CODES[name_of(dtype)], at(out), row_pointers, in_c, 8, hidden, ctypes.c_float(1.25))
        assert_same(out, in_torch(rows, weights, 1.25))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_casts(plain, dtype):
    values, code = structured_floats(), DTYPE_CODES[name_of(dtype)]
    narrowed = torch.empty(len(values), dtype=dtype)
    plain.narrow(code, at(narrowed), at(values), len(values))
    assert_same(narrowed, narrow(values, dtype))
    widened = torch.empty(len(values))
    plain.widen(code, at(widened), at(narrowed), len(values))
    assert_same(widened, widen(narrowed))


def test_plain_cast_to_e4m3(plain):
    values = structured_floats()
    q = torch.empty(len(values), dtype=torch.uint8)
    plain.cast(at(q), at(values), len(values))
    assert torch.equal(q, cast(values))


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_quantize(plain, dtype, scale):
    for hidden in (8, 128, 200, 7168):
        x = some_rows(hidden, 16, hidden, dtype)
        x[15, ::5] = torch.nan
        want_q, want_scales = quantize(x, scale)
        q, scales = torch.empty_like(x, dtype=E4M3), torch.empty_like(want_scales)
        assert scales.shape[1] * 4 == core.scale_bytes(scale, hidden)
        for row in range(16):
            code = DTYPE_CODES[name_of(dtype)]
            plain.quantize(code, SCALE_CODES[scale], at(q[row]), at(scales[row]), at(x[row]), hidden)
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
        assert same_scales(scales, want_scales).all()
