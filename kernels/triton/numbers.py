"""Number formats of a row, by bits: the same results as every other machine, whatever a target's own casts do.

Triton's interpreter truncates to bfloat16, and rounds its fp8 casts wrong (triton-lang/triton, issue 8322).
"""

import triton.language as tl

from fault_a2a.kernels.triton.layout import DTYPES, QUANTIZE, constant
from fault_a2a.kernels.triton.target import inline
from fault_a2a.kernels.triton.words import integers, max_of, store32

BFLOAT16, FLOAT16 = constant(DTYPES["bfloat16"]), constant(DTYPES["float16"])
UE8M0 = constant(QUANTIZE["ue8m0"])
MAGNITUDE, INFINITY = constant(0x7FFFFFFF), constant(0x7F800000)
QUANTIZED_BLOCK = constant(128)
E4M3_NAN, UE8M0_NAN, FLOAT_NAN = constant(0x7F), constant(0xFF), constant(0x7FC00000)


@inline
def float_of(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@inline
def bits_of(value):
    """Of a float32, as an int64."""
    return value.to(tl.int32, bitcast=True).to(tl.int64)


@inline
def load_elements(address, mask, dtype: tl.constexpr):
    """Elements of a row, each to float32."""
    if dtype == BFLOAT16:
        half = tl.load(address.to(tl.pointer_type(tl.int16)), mask=mask, other=0)
        value = (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif dtype == FLOAT16:
        half = tl.load(address.to(tl.pointer_type(tl.int16)), mask=mask, other=0)
        value = half.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        word = tl.load(address.to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        value = word.to(tl.float32, bitcast=True)
    return value


@inline
def store_elements(address, value, mask, dtype: tl.constexpr):
    """Float32 values as elements of a row, rounded to even."""
    if dtype == BFLOAT16:
        bits = bits_of(value)
        magnitude = bits & MAGNITUDE
        # Rounded like a number, a NaN could carry into the sign or become an infinity.
        rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
        half = tl.where(magnitude > INFINITY, 0x7FC0, rounded | ((bits >> 16) & 0x8000))
        tl.store(address.to(tl.pointer_type(tl.int16)), half.to(tl.int16), mask=mask)
    elif dtype == FLOAT16:
        half = value.to(tl.float16).to(tl.int16, bitcast=True)
        tl.store(address.to(tl.pointer_type(tl.int16)), half, mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.int32)), value.to(tl.int32, bitcast=True), mask=mask)


@inline
def e4m3_of(value):
    """The byte of an |value| <= 464, half way to the number after 448, which is not there."""
    bits = bits_of(value)
    magnitude = bits & MAGNITUDE
    # 2^14 has units of 2^-9 in its last place, as have the denormals of e4m3: the addition rounds them, to even.
    small = bits_of(float_of(magnitude) + 16384.0) - (141 << 23)
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    return tl.where(magnitude < (121 << 23), small, normal) | ((bits >> 24) & 0x80)


@inline
def quantized_block(x, first, hidden: tl.constexpr, dtype: tl.constexpr, is_ue8m0: tl.constexpr):
    """128 elements as bytes of fp8 e4m3, and their scale's bits: a float32's, or an exponent."""
    element = first + integers(QUANTIZED_BLOCK)
    inside = element < hidden
    item: tl.constexpr = 4 if dtype > FLOAT16 else 2
    value = load_elements(x + item * element, inside, dtype)
    # Magnitudes compare as integers, NaN above infinity above the rest: one reduction finds the largest and what is
    # not finite.
    largest = max_of(tl.where(inside, bits_of(value) & MAGNITUDE, 0), 0)
    is_finite = largest < INFINITY
    amax = float_of(tl.where(is_finite, largest, 0))
    scale = tl.div_rn(tl.where(amax > 1e-4, amax, amax * 0.0 + 1e-4), amax * 0.0 + 448.0)
    bits = bits_of(scale)
    if is_ue8m0:
        # The smallest power of two that is not below the scale.
        exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
        scale = float_of(exponent << 23)
        bits = tl.where(is_finite, exponent, UE8M0_NAN)
    else:
        bits = tl.where(is_finite, bits, FLOAT_NAN)
    q = e4m3_of(tl.where(is_finite, value, 0.0) * tl.div_rn(scale * 0.0 + 1.0, scale))
    return tl.where(is_finite, q, E4M3_NAN), bits


@inline
def store_quantized_block(to, scales, x, first, hidden: tl.constexpr, dtype: tl.constexpr, is_ue8m0: tl.constexpr):
    """A row ``x`` from element ``first`` on: its bytes into the row ``to``, their scale among the row's ``scales``."""
    q, bits = quantized_block(x, first, hidden, dtype, is_ue8m0)
    element = first + integers(QUANTIZED_BLOCK)
    tl.store((to + element).to(tl.pointer_type(tl.int8)), q.to(tl.int8), mask=element < hidden)
    if is_ue8m0:
        tl.store((scales + first // QUANTIZED_BLOCK).to(tl.pointer_type(tl.int8)), bits.to(tl.int8))
    else:
        store32(scales + first // QUANTIZED_BLOCK * 4, bits)


@inline
def copy_words(to, source, num_bytes: tl.constexpr, block: tl.constexpr, mask):
    """A row: its rows are whole words of eight bytes, since ``hidden`` is a multiple of eight."""
    for first in range(0, num_bytes // 8, block):
        word = first + integers(block)
        inside = (word < num_bytes // 8) & mask
        value = tl.load((source + 8 * word).to(tl.pointer_type(tl.int64)), mask=inside)
        tl.store((to + 8 * word).to(tl.pointer_type(tl.int64)), value, mask=inside)


@inline
def copy_bytes(to, source, num_bytes: tl.constexpr, block: tl.constexpr, mask):
    """Scales, which may be of any type."""
    for first in range(0, num_bytes, block):
        byte = first + integers(block)
        inside = (byte < num_bytes) & mask
        value = tl.load((source + byte).to(tl.pointer_type(tl.int8)), mask=inside)
        tl.store((to + byte).to(tl.pointer_type(tl.int8)), value, mask=inside)
