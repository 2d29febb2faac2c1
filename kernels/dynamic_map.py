"""The 8-bit dynamic maps and their block scales: what 8-bit moments are stored in.

Owns: the values of the 256 codes, the nearest code of a value, the scale of a block.
Does not: step (adam.py); convert whole state tensors (moments.py).

The maps are those of Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit optimizers via block-wise quantization (ICLR 2022),
as their library (bitsandbytes, `create_dynamic_map`) fills them: seven decades of 0.1 .. 1, each cut in twice as many
equal parts as the one below, an entry in the middle of each part, and 0 and 1. Codes count the sorted entries.

Note [Dynamic map]: a decade is i = 0 .. 6, its entries number 2^i (signed) or 2^(i+1) (unsigned, half the parts). In
units of 1e-6 the entry in the middle of part j of n is 10^(i-1) * (1 + 9 * (j + 1/2) / n), for i > 0 a whole number
of eighths below 2^20: exact in fp32, as are the borders between parts, 10^(i-1) * (1 + 9 * j / n). And n + j, as a
floating-point number, has the exponent log2(n) and the mantissa 1 + j / n: entries follow from codes by arithmetic on
exponents and mantissas. The other way, the part is (x - 10^(i-1)) * n / (9 * 10^(i-1)), cut off: the difference is
exact, and for every border the product in fp32 happens to be at least j, and for the float below it less than j (a test
tries them all; between them all operations are monotone). So codes are those of the nearest entry, ties to the larger
magnitude, without a gather or a search through 256 entries.

A block's scale is its largest magnitude, or 2^-106 where that is smaller but not 0; a code stands for entry * scale.
Where all values are 0, so is the scale, and what is decoded. Where a value of the block is Inf or NaN, the scale is
NaN, and so is the whole block when it is decoded.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

import numpy as np
from llvmlite import ir

from offload.kernels.simd import BOOL, F32, I8, I32, I64, WIDTH, Cpu, Vector, call, cgutils, splat, vector_of

BLOCK_8BIT_NUMEL: Final = 256
"""Elements that share a scale, counted from the start of the flat parameter."""

UNIT: Final = 1e6
"""The largest entry, 1.0, in the units of Note [Dynamic map]."""

LEAST_SCALE_BITS: Final = (127 - 106) << 23
"""2^-106, the least scale but 0: what it is divided by to bring values into units of 1e-6 must not overflow."""

NUM_DECADES: Final = 7
EXPONENT_ONE: Final = 127
MANTISSA_BITS: Final = 23
MANTISSA: Final = (1 << MANTISSA_BITS) - 1


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


def _not_below(exact: Fraction) -> float:
    nearest = np.float32(float(exact))
    return float(nearest if Fraction(float(nearest)) >= exact else np.nextafter(nearest, np.float32(np.inf)))


class DynamicMap:
    """Emits codes of values and values of codes.

    `has_signs`: whether values to encode may have a sign bit; the unsigned map drops it.
    """

    __slots__ = ("_builder", "_cpu", "_extra_bits", "_has_signs", "_signed", "_starts")

    def __init__(self, builder: Any, cpu: Cpu, signed: bool, *, has_signs: bool = True) -> None:
        self._builder = builder
        self._cpu = cpu
        self._signed = signed
        self._has_signs = has_signs
        self._extra_bits = 0 if signed else 1  # an unsigned decade has twice as many parts
        self._starts = starts_of_decades(signed)

    def decode(self, codes: Vector) -> Vector:
        """The entries of codes (i8), of magnitude 0 to 1."""
        codes = codes.to("zext", I32)
        signed = codes - 127 if self._signed else codes
        count = call(f"llvm.abs.v{WIDTH}i32", signed, false(self._builder)) if self._signed else codes
        # Twice (n + j + 1/2): its mantissa is that of the middle of part j, its exponent tells the decade.
        middle = (count + count + (1 if self._signed else 3)).to("sitofp", F32).to("bitcast", I32)
        powers = powers_to_decode(self._signed)
        power = self._cpu.lookup(powers[-self._extra_bits :] + powers[: -self._extra_bits], middle >> MANTISSA_BITS)
        mantissa = ((middle & MANTISSA) | (EXPONENT_ONE << MANTISSA_BITS)).to("bitcast", F32)
        entry = power * self._cpu.fma(mantissa, mantissa.like(9.0), mantissa.like(-8.0))
        entry = count.above(0).choose(entry, entry.like(0.0))
        return ((signed & 0x80000000) | entry.to("bitcast", I32)).to("bitcast", F32) if self._signed else entry

    def encode(self, values: Vector) -> Vector:
        """Codes (i8) of values in units of 1e-6, up to 1e6 in magnitude."""
        bits = values.to("bitcast", I32)
        x = (bits & 0x7FFFFFFF).to("bitcast", F32) if self._has_signs else values
        decade = self._decade_of(x)
        # Part 0 of the last "decade" is the code of 1.
        starts = self._cpu.lookup([0.0, *(10.0 ** (i - 1) for i in range(1, NUM_DECADES)), 0.0], decade)
        inverses = self._cpu.lookup([*(inverse_of_part(self._signed, i) for i in range(NUM_DECADES)), 0.0], decade)
        last_parts = self._cpu.lookup([*(2.0 ** (i + self._extra_bits) - 1 for i in range(NUM_DECADES)), 0.0], decade)
        part = ((x - starts) * inverses).lesser(last_parts).to("fptosi", I32)
        count = part + (part.like(1 << self._extra_bits) << decade)
        if not self._signed:
            return x.at_least(self._starts[0]).choose(count - 1, count.like(0)).to("trunc", I8)
        count = x.at_least(self._starts[0]).choose(count, count.like(0))
        is_negative = Vector(self._builder, self._builder.ashr(bits.value, bits.like(31).value))  # all bits or none
        code = (count ^ is_negative) - is_negative + 127
        # There is no -1: the lowest code is that of -0.993.
        return call(f"llvm.smax.v{WIDTH}i32", code, code.like(0)).to("trunc", I8)

    def _decade_of(self, x: Vector) -> Vector:
        """The decade of positive values, 7 where the code is that of 1; anything below the first."""
        if self._cpu.has_avx512:
            # No binade holds the starts of two decades: what is added carries into the exponent from that start on.
            bits = x.to("bitcast", I32)
            return (
                bits + lookup32(self._builder, addends_of_binades(self._starts), bits >> MANTISSA_BITS)
            ) >> MANTISSA_BITS
        one, two, three, four, five, six, seven = (x.like(start) for start in self._starts[1:])
        high = x.at_least(four)
        middle = x.at_least(high.choose(six, two))
        low = x.at_least(high.choose(middle.choose(seven, five), middle.choose(three, one)))
        zero = x.to("bitcast", I32).like(0)
        return high.choose(zero.like(4), zero) | middle.choose(zero.like(2), zero) | low.choose(zero.like(1), zero)


def powers_to_decode(signed: bool) -> list[float]:
    """10^(decade - 7), and what makes the last code, which has a decade of its own, exactly 1."""
    middle = np.float32(9 * (1 + 2.0 ** -(NUM_DECADES + 1 if signed else NUM_DECADES + 2)) - 8)
    around = np.float32(1) / middle
    near = [np.nextafter(around, np.float32(0)), around, np.nextafter(around, np.float32(2))]
    last = next(power for power in near if power * middle == np.float32(1))
    return [*(10.0 ** (i - NUM_DECADES) for i in range(NUM_DECADES)), float(last)]


def inverse_of_part(signed: bool, decade: int) -> float:
    """Parts in a unit of 1e-6. The first decade counts from 0 on: its entries are rounded, and so is their middle."""
    if decade == 0:
        return 1 / 0.55
    return 2.0 ** (decade if signed else decade + 1) / (9 * 10.0 ** (decade - 1))


def addends_of_binades(starts: list[float]) -> list[int]:
    """For each value of the exponent's lowest five bits, from 2^-8 on: what to add to a number's bits so that its
    exponent becomes its decade."""
    addends = [0] * 32
    for exponent in range(-8, 24):
        below = sum(start <= 2.0**exponent for start in starts[1:])
        addend = (below - EXPONENT_ONE - exponent) << MANTISSA_BITS
        for start in starts[1:]:
            if 2.0**exponent < start < 2.0 ** (exponent + 1):
                addend += (1 << MANTISSA_BITS) - (int(np.float32(start).view(np.uint32)) & MANTISSA)
        addends[(EXPONENT_ONE + exponent) % 32] = addend % 2**32
    return addends


def lookup32(builder: Any, table: list[int], index: Vector) -> Vector:
    """Per element the entry of a table of 32 integers at the lowest five bits of `index`; AVX-512 alone."""
    low, high = (Vector(builder, ir.Constant(vector_of(I32), half)) for half in (table[:WIDTH], table[WIDTH:]))
    return call("llvm.x86.avx512.vpermi2var.d.512", low, index, high)


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
            magnitude = magnitude & 0x7FFFFFFF
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
