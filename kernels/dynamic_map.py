"""The 8-bit dynamic maps and their block scales: what 8-bit moments are stored in.

Owns: the values of the 256 codes, the nearest code of a value, the scale of a block.
Does not: step (adam.py); convert whole state tensors (moments.py).

The maps are those of Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit optimizers via block-wise quantization (ICLR 2022),
as their library (bitsandbytes, `create_dynamic_map`) fills them: seven decades of 0.1 .. 1, each cut in twice as many
equal parts as the one below, an entry in the middle of each part, and 0 and 1. Codes count the sorted entries.

Note [Dynamic map]: a decade is i = 0 .. 6, its entries number n = 2^i (signed) or 2^(i+1) (unsigned, half the parts).
In units of 1e-6 the entry in the middle of part j of n is 10^(i-1) * (1 + 9 * (j + 1/2) / n), for i > 0 a whole number
of eighths below 2^20: exact in fp32, as are the borders between parts, 10^(i-1) * (1 + 9 * j / n). And n + j, as a
floating-point number, has the exponent log2(n): it tells the decade, and the entry is 9 * (n + j) + 9/2 - 8 * n, exact,
times 10^(i-1) / n. The other way, the part is (x - 10^(i-1)) * n / (9 * 10^(i-1)), truncated: the difference is exact,
and for every border the product in fp32 happens to be at least j, and for the float below it less than j (a test tries
them all; between them all operations are monotone). So codes are those of the nearest entry, ties to the larger
magnitude, without a gather or a search through 256 entries.

Note [Decades]: the bits of a positive float, as an integer, are nearly its logarithm. Multiplied by 17 / 2^29 they grow
by less than 1 from one start of a decade to the next, so that the integer part is that of the decade or of the one
below it; a comparison with the next start tells which. It counts from 33 on: the lowest three bits are 1 + the decade.

A block's scale is its largest magnitude, or 2^-106 where that is smaller but not 0; a code stands for entry * scale.
Where all values are 0, so is the scale, and what is decoded. Where a value of the block is Inf or NaN, the scale is
NaN, and so is the whole block when it is decoded.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

import numpy as np
from llvmlite import ir

from offload.kernels.simd import BOOL, F32, I32, I64, WIDTH, Cpu, Vector, call, cgutils, splat, vector_of

BLOCK_8BIT_NUMEL: Final = 256
"""Elements that share a scale, counted from the start of the flat parameter."""

UNIT: Final = 1e6
"""The largest entry, 1.0, in the units of Note [Dynamic map]."""

LEAST_SCALE_BITS: Final = (127 - 106) << 23
"""2^-106, the least scale but 0: what it is divided by to bring values into units of 1e-6 must not overflow."""

NUM_DECADES: Final = 7
EXPONENT_ONE: Final = 127
MANTISSA_BITS: Final = 23
SIGN: Final = 0x80000000
MAGNITUDE: Final = 0x7FFFFFFF
INFINITY: Final = float("inf")
ZERO_CODE: Final = 127
"""The signed map's code of 0."""


def entries_of(signed: bool) -> list[float]:
    """The entries that are not negative, in units of 1e-6 and rounded to fp32 (the first decade's alone need it)."""
    entries = [0.0]
    for decade in range(NUM_DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        for part in range(parts):
            exact = Fraction(10) ** (decade - 1) * (1 + Fraction(9 * (2 * part + 1), 2 * parts))
            entries.append(float(np.float32(float(exact))))
    return [*entries, UNIT]


def starts_of_decades(signed: bool) -> list[float]:
    """From where on a value, in units of 1e-6, is nearer to the first entry of decade i than to what lies below it."""
    entries = entries_of(signed)
    firsts = [2**i if signed else 2 ** (i + 1) - 1 for i in range(NUM_DECADES + 1)]
    middles = [(Fraction(entries[first - 1]) + Fraction(entries[first])) / 2 for first in firsts]
    return [_not_below(middle) for middle in middles]


def before(number: float) -> float:
    """The greatest float below one that is positive."""
    return float(np.nextafter(np.float32(number), np.float32(0)))


def _not_below(exact: Fraction) -> float:
    nearest = np.float32(float(exact))
    return float(nearest if Fraction(float(nearest)) >= exact else np.nextafter(nearest, np.float32(np.inf)))


class DynamicMap:
    """Emits codes of values and values of codes.

    `has_signs`: whether values to encode may have a sign bit; the unsigned map drops it.
    """

    __slots__ = ("_builder", "_cpu", "_has_signs", "_signed", "_starts")

    def __init__(self, builder: Any, cpu: Cpu, signed: bool, *, has_signs: bool = True) -> None:
        self._builder = builder
        self._cpu = cpu
        self._signed = signed
        self._has_signs = has_signs
        self._starts = starts_of_decades(signed)

    def decode(self, codes: Vector, scale: Vector) -> Vector:
        """What codes (i8) stand for in a block of this scale."""
        wide = self._cpu.from_bytes(codes)
        signed = wide - ZERO_CODE if self._signed else wide
        # n + j, or 0 and 1 for the code of 0: these find the entries of another decade, which make them less than 0.
        number = call(f"llvm.abs.v{WIDTH}i32", signed, false(self._builder)) if self._signed else wide + 1
        number = number.to("sitofp", F32)
        decade = number.to("bitcast", I32) >> MANTISSA_BITS
        offsets, powers = tables_to_decode(self._signed)
        middle = self._cpu.fma(number, number.like(9.0), self._cpu.lookup(F32, offsets, decade)).to("bitcast", I32)
        entry = smax(middle, middle.like(0)).to("bitcast", F32) * self._cpu.lookup(F32, powers, decade)
        if self._signed:
            scale = (scale.to("bitcast", I32) ^ (signed & SIGN)).to("bitcast", F32)
        return entry * scale

    def encode(self, values: Vector) -> Vector:
        """Codes (i8) of values in units of 1e-6, up to 1e6 in magnitude."""
        bits = values.to("bitcast", I32)
        x = (bits & MAGNITUDE).to("bitcast", F32) if self._has_signs else values
        x = x.greater(before(self._starts[0]))
        decade = self._decade_of(x)
        starts, inverses, last_parts = tables_to_encode(self._signed)
        part = (x - self._cpu.lookup(F32, starts, decade)) * self._cpu.lookup(F32, inverses, decade)
        last_part = self._cpu.lookup(I32, last_parts, decade)
        # In decade 0 the part may be -1, which gives the code of 0.
        below = smin(part.to("fptosi", I32), last_part) + last_part  # entries between 0 and this one
        if not self._signed:
            return self._cpu.narrow_unsigned(below)
        is_negative = Vector(self._builder, self._builder.ashr(bits.value, bits.like(31).value))  # all bits or none
        # There is no -1: it saturates to the lowest code, that of -0.993.
        return self._cpu.narrow_signed((below ^ is_negative) + is_negative) ^ 0x80

    def _decade_of(self, x: Vector) -> Vector:
        """1 + the decade, in the lowest three bits, of values from before(starts[0]) on. See Note [Decades]."""
        bits = x.to("bitcast", I32)
        low = (bits + (bits >> 4)) >> 25
        return x.at_least(self._cpu.lookup(F32, rotated([*self._starts[1:], INFINITY]), low)).choose(low + 1, low)


def rotated(table: list[Any]) -> list[Any]:
    """A table by decade as `DynamicMap._decade_of` counts them: from 1 on, modulo 8."""
    return table[-1:] + table[:-1]


def tables_to_decode(signed: bool) -> tuple[list[float], list[float]]:
    """a and p by the lowest three bits of the exponent of n + j, so that its entry is (9 * (n + j) + a) * p.

    In the first factor, a small number of halves, nothing is rounded; p is 10^(i - 7) / n, and for the last code, which
    has a decade of its own, what makes it exactly 1.
    """
    offsets, powers = [0.0] * 8, [0.0] * 8
    for decade in range(NUM_DECADES + 1):
        n = 2**decade if signed else 2 ** (decade + 1)
        at = (EXPONENT_ONE + n.bit_length() - 1) % 8
        offsets[at] = 4.5 - 8 * n
        powers[at] = float(np.float32(10.0 ** (decade - NUM_DECADES))) / n
        if decade == NUM_DECADES:
            around = np.float32(1) / np.float32(9 * n + offsets[at])
            near = [np.nextafter(around, np.float32(0)), around, np.nextafter(around, np.float32(2))]
            powers[at] = float(next(power for power in near if power * np.float32(9 * n + offsets[at]) == 1))
    return offsets, powers


def tables_to_encode(signed: bool) -> tuple[list[float], list[float], list[int]]:
    """By decade: where part 0 begins, parts in a unit of 1e-6, the last part. As `DynamicMap._decade_of` counts them.

    Decade 0 counts from between its first two borders. Truncation is towards 0, so -1 is what lies below the first
    border, 0 what lies between both, 1 what lies above: the rounded products are exact at both.
    """
    border = np.float32(starts_of_decades(signed)[0])
    if signed:  # one part
        first = (float(np.float32(before(float(border))) + np.float32(0.125)), 8.0)
    else:  # two parts
        entries = entries_of(signed)
        second = _not_below((Fraction(entries[1]) + Fraction(entries[2])) / 2)
        first = ((float(border) + second) / 2, 2 / (second - float(border)))
    starts = [first[0], *(10.0 ** (i - 1) for i in range(1, NUM_DECADES)), 0.0]
    sizes = [2**i if signed else 2 ** (i + 1) for i in range(NUM_DECADES + 1)]
    inverses = [first[1], *(sizes[i] / (9 * 10.0 ** (i - 1)) for i in range(1, NUM_DECADES)), 0.0]
    return rotated(starts), rotated(inverses), rotated([size - 1 for size in sizes])


def smin(a: Vector, b: Vector) -> Vector:
    """Per element the smaller integer, signed."""
    return call(f"llvm.smin.v{WIDTH}i32", a, b)


def smax(a: Vector, b: Vector) -> Vector:
    """Per element the greater integer, signed."""
    return call(f"llvm.smax.v{WIDTH}i32", a, b)


def false(builder: Any) -> Vector:
    """The constant i1 0, as an argument of `call`."""
    return Vector(builder, ir.Constant(BOOL, 0))


class BlockScale:
    """Emits the scale of one block: collects its values, then gives what they are multiplied by."""

    __slots__ = ("_builder", "_has_signs", "_largest")

    def __init__(self, builder: Any, largest: Any, *, has_signs: bool = True) -> None:
        self._builder = builder
        self._has_signs = has_signs
        self._largest = largest
        """A variable of sixteen i32: bits of magnitudes, which sort as the magnitudes do, NaN above all."""

    def clear(self) -> None:
        """Begin a block."""
        self._builder.store(ir.Constant(vector_of(I32), [0] * WIDTH), self._largest)

    def add(self, values: Vector) -> None:
        """Some of the block's values, fp32. A NaN may have a sign in any case."""
        magnitude = values.to("bitcast", I32)
        if self._has_signs:
            magnitude = magnitude & MAGNITUDE
        largest = Vector(self._builder, self._builder.load(self._largest))
        self._builder.store(call(f"llvm.umax.v{WIDTH}i32", largest, magnitude).value, self._largest)

    def finish(self, target: Any) -> Vector:
        """Store the scale at `target`; what is returned times a value of the block is that value in units of 1e-6."""
        builder = self._builder
        kind = ir.FunctionType(I32, [vector_of(I32)])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.umax.v{WIDTH}i32")
        largest = splat(builder, builder.call(reduce, [builder.load(self._largest)]))
        largest = largest.above(0x7F7FFFFF).choose(largest.like(0x7FC00000), largest)
        scale = call(f"llvm.umax.v{WIDTH}i32", largest, largest.like(LEAST_SCALE_BITS)).to("bitcast", F32)
        stored = largest.above(0).choose(scale, scale.like(0.0))
        builder.store(builder.extract_element(stored.value, I32(0)), target)
        return scale.like(UNIT) / scale


def each_block(builder: Any, numel: Any, emit: Callable[[Any, Any, Any], None]) -> None:
    """Emit a loop over the blocks of [0, numel): `emit(start, stop, number of the block)`."""
    size = I64(BLOCK_8BIT_NUMEL)
    with cgutils.for_range_slice(builder, I64(0), numel, size, intp=I64) as (start, number):
        rest = builder.sub(numel, start)
        is_last = builder.icmp_signed("<", rest, size)
        emit(start, builder.select(is_last, numel, builder.add(start, size)), number)
