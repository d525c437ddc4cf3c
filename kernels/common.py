"""What the Triton kernels share: products of stated precision, rounding, random words, launch classes.

The helpers make one source right both compiled and in Triton's interpreter, which multiplies bfloat16 as
integers and truncates where it should round.
"""

import contextlib
import functools
import os

import numpy
import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def is_interpreted():
    """Whether the kernels imported in this process run in Triton's interpreter."""
    return INTERPRET.value


def quiet():
    """A context in which the interpreter, which computes with NumPy, says nothing of infinities and NaN."""
    return numpy.errstate(all="ignore") if is_interpreted() else contextlib.nullcontext()


def architecture(device):
    """The key of the configuration tables: compute capability as one number, 80, 86, 89, 90, 100 or 120.

    Capabilities between or beyond those use the nearest one below; the interpreter uses 0.
    """
    if is_interpreted() or device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    known = (80, 86, 89, 90, 100, 120)
    return max((cc for cc in known if cc <= 10 * major + minor), default=80)


def multiprocessors(device):
    """How many multiprocessors a device has; a few in the interpreter."""
    if is_interpreted() or device.type != "cuda":
        return 4
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _multiprocessors(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Acc + a b in float32. PRECISION is that of float32 operands: "ieee", "tf32x3" or "tf32".

    Not for float64: Triton 3.6 cannot compile that for sm_80 to 100.
    """
    if INTERPRET and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, T: tl.constexpr):
    """A float32 tile in dtype T, to nearest even."""
    if INTERPRET and T == tl.bfloat16:  # noqa: SIM300
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        rounded = tl.where((u & 0x7FFFFFFF) > 0x7F800000, (u >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        if INTERPRET and T == tl.float16:  # noqa: SIM300
            x = tl.where(x >= 65520.0, float("inf"), x)  # what overflows: NumPy would warn
            x = tl.where(x <= -65520.0, float("-inf"), x)
        return x.to(T)


@triton.jit
def round_stochastically(x, words, T: tl.constexpr):
    """A float32 tile in dtype T: random low bits are added to the bit pattern and the rest is cut off.

    Same bits as fastedit.ops.philox.round_stochastically. What is not finite is converted as it is.
    """
    u = x.to(tl.uint32, bitcast=True)
    if T == tl.bfloat16:  # noqa: SIM300
        out = (((u + (words & 0xFFFF)) >> 16) << 16).to(tl.float32, bitcast=True)
    else:
        out = (((u + (words & 0x1FFF)) >> 13) << 13).to(tl.float32, bitcast=True)
        units = tl.abs(x) * 16777216.0  # under 2^-14 float16 is a grid of 2^-24
        whole = tl.floor(units)
        up = (units - whole) * 8192.0 >= 8192.0 - (words & 0x1FFF).to(tl.float32)
        grid = tl.where(up, whole + 1.0, whole) * 5.9604644775390625e-8
        signed = (grid.to(tl.uint32, bitcast=True) | (u & 0x80000000)).to(tl.float32, bitcast=True)
        out = tl.where(tl.abs(x) < 6.103515625e-05, signed, out)
    return round_to(tl.where((u & 0x7F800000) == 0x7F800000, x, out), T)


@triton.jit
def philox_words(
    seed, outer, inner_start, INNER, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, third=0, fourth=0
):
    """The random words of elements (outer[o], inner_start + k), k < BLOCK, of an (OUTER, INNER) tensor.

    Philox4x32-10 of (seed, linear index): word ``index % 4`` of counter ``index // 4``, whose high half is
    (third, fourth). ALIGNED: INNER, inner_start and BLOCK divide by 4, so that every counter is computed once
    instead of four times.
    """
    if ALIGNED:
        index = outer.to(tl.int64)[:, None] * INNER + inner_start + 4 * tl.arange(0, BLOCK // 4)[None, :]
        w0, w1, w2, w3 = _philox(seed, index, third, fourth)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last index runs fastest: w0 w1 w2 w3
        return tl.reshape(words, (outer.shape[0], BLOCK))
    else:
        index = outer.to(tl.int64)[:, None] * INNER + inner_start + tl.arange(0, BLOCK)[None, :]
        w0, w1, w2, w3 = _philox(seed, index, third, fourth)
        lane = index & 3
        return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def _philox(seed, index, third, fourth):
    counter = index >> 2
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, (zero + third).to(tl.uint32), (zero + fourth).to(tl.uint32))
