"""SIMD vectors of sixteen elements, emitted as LLVM IR: what kernels are written in.

Owns: arithmetic on `Vector`, conversions of bf16 and fp16, the loop over an array with its tail.
Does not: know optimizers or sums (adam.py, cast.py, reduce.py) or how a kernel is compiled (jit.py).

Note [Vectors]: kernels do not use LLVM's loop vectoriser. It gives up on loops over five arrays (too many alias checks)
and leaves tails to scalar code that may round differently. Here every element passes through the same sequence of
IEEE operations: a tail is copied into a zeroed vector on the stack and computed as the body is. So the bits of an
element depend on its values alone: not on its position, the length of the array or how a caller cuts it. No fast-math
flag is ever set; a multiply-add is fused only where `fma` is written.
LLVM splits a vector into the widest registers there are (one of AVX-512, two of AVX2, four of NEON).

So CPUs with a fused multiply-add leave the same bits, whatever the width of their registers. One without rounds a
product before it is added: steps differ from those of other CPUs in their last bits; kernels that only convert, sum,
split or encode do not (a test compares generic, nehalem and haswell with this machine).

Note [Pairs]: AVX2 holds a vector in two registers, and has no instruction for what AVX-512 does in one: widen 16 values
of 16 bits from one register to two, or narrow them back. So where every array of a kernel has 16 bits or less (or lies
in the kernel's own frame), its vectors hold the even elements and then the odd ones, as a register of 16 pairs splits
by one shift and one mask, and joins by one shift and one blend (`Cpu.in_pairs`). Arithmetic is by element and does not
see the order; what depends on an element's number asks `Cpu.numbers`.

Values of 16 bits are read and written as integers: numba knows neither dtype on the CPU. Conversions keep subnormals;
they round as the thread's control register says for fp32 arithmetic (flush-to-zero is off unless the user sets it).
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

cgutils: Any = untyped_cgutils

WIDTH: Final = 16
"""fp32 elements of the widest register in use (AVX-512)."""

F32: Final = ir.FloatType()
F64: Final = ir.DoubleType()
F16: Final = ir.HalfType()
BOOL: Final = ir.IntType(1)
I8: Final = ir.IntType(8)
I16: Final = ir.IntType(16)
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)

ELEMENT: Final[dict[str, Any]] = {"fp32": types.float32, "bf16": types.uint16, "fp16": types.uint16}
"""numba's element type of the array that holds a dtype."""

MEMORY: Final[dict[str, ir.Type]] = {"fp32": F32, "bf16": I16, "fp16": I16}
"""What an element of a dtype is in memory."""


def vector_of(element: ir.Type) -> ir.VectorType:
    """The type of a vector of such elements."""
    return ir.VectorType(element, WIDTH)


class Vector:
    """Sixteen values of one type, and the arithmetic on them; each operator emits one instruction.

    Floats: + - * / are IEEE operations. Integers: + - * & | ^ << >> and comparisons are unsigned.
    """

    __slots__ = ("builder", "value")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    def like(self, number: float) -> "Vector":
        """`number` in every element, of this type."""
        return Vector(self.builder, ir.Constant(self.value.type, [number] * self.value.type.count))

    def _other(self, other: "Vector | int | float") -> Any:
        return other.value if isinstance(other, Vector) else self.like(other).value

    def _emit(self, on_float: str | None, on_int: str | None, other: "Vector | int | float") -> "Vector":
        is_int = isinstance(self.value.type.element, ir.IntType)
        name = on_int if is_int else on_float
        assert name is not None, "this operation does not exist on elements of this type"
        return Vector(self.builder, getattr(self.builder, name)(self.value, self._other(other)))

    def __add__(self, other: "Vector | int | float") -> "Vector":
        return self._emit("fadd", "add", other)

    def __sub__(self, other: "Vector | int | float") -> "Vector":
        return self._emit("fsub", "sub", other)

    def __mul__(self, other: "Vector | int | float") -> "Vector":
        return self._emit("fmul", "mul", other)

    def __truediv__(self, other: "Vector | int | float") -> "Vector":
        return self._emit("fdiv", None, other)

    def __and__(self, other: "Vector | int | float") -> "Vector":
        return self._emit(None, "and_", other)

    def __or__(self, other: "Vector | int | float") -> "Vector":
        return self._emit(None, "or_", other)

    def __xor__(self, other: "Vector | int | float") -> "Vector":
        return self._emit(None, "xor", other)

    def __lshift__(self, other: "Vector | int | float") -> "Vector":
        return self._emit(None, "shl", other)

    def __rshift__(self, other: "Vector | int | float") -> "Vector":
        return self._emit(None, "lshr", other)

    def above(self, other: "Vector | int") -> "Vector":
        """Per element: whether the integer is greater, unsigned."""
        return Vector(self.builder, self.builder.icmp_unsigned(">", self.value, self._other(other)))

    def at_least(self, other: "Vector | float") -> "Vector":
        """Per element: whether the float is greater or equal; a NaN is not."""
        return Vector(self.builder, self.builder.fcmp_ordered(">=", self.value, self._other(other)))

    def exceeds(self, other: "Vector | float") -> "Vector":
        """Per element: whether the float is greater; a NaN is not."""
        return Vector(self.builder, self.builder.fcmp_ordered(">", self.value, self._other(other)))

    def is_nan(self) -> "Vector":
        """Per element: whether the float is a NaN."""
        return Vector(self.builder, self.builder.fcmp_unordered("uno", self.value, self.value))

    def exceeds_or_is_nan(self, other: "Vector") -> "Vector":
        """Per element: whether the float is greater than `other`, or is a NaN itself."""
        return Vector(self.builder, self.builder.or_(self.exceeds(other).value, self.is_nan().value))

    def greater(self, other: "Vector | float") -> "Vector":
        """Per element the greater float; `other` where this is a NaN: one instruction on x86."""
        return self.exceeds(other).choose(self, Vector(self.builder, self._other(other)))

    def choose(self, yes: "Vector", no: "Vector") -> "Vector":
        """Per element: `yes` where this (a comparison) holds, else `no`."""
        return Vector(self.builder, self.builder.select(self.value, yes.value, no.value))

    def to(self, instruction: str, element: ir.Type) -> "Vector":
        """Converted by one of LLVM's instructions: fpext, fptrunc, zext, sext, trunc, sitofp, fptosi, bitcast."""
        return Vector(
            self.builder, getattr(self.builder, instruction)(self.value, ir.VectorType(element, self.value.type.count))
        )

    def sqrt(self) -> "Vector":
        """The correctly rounded square root."""
        return call(f"llvm.sqrt.v{WIDTH}f32", self)

    def total(self) -> Any:
        """The sum of the elements as a scalar, by halves: 0+8, 1+9, …, then 0+4, …"""
        builder, value, half = self.builder, self.value, WIDTH // 2
        unused = ir.Constant(value.type, ir.Undefined)
        while half:
            order = ir.Constant(vector_of(I32), [(i + half) % WIDTH for i in range(WIDTH)])
            value = builder.fadd(value, builder.shuffle_vector(value, unused, order))
            half //= 2
        return builder.extract_element(value, ir.Constant(I32, 0))


def call(name: str, *vectors: Vector) -> Vector:
    """One of LLVM's intrinsics that returns a vector of the first one's type."""
    builder, kinds = vectors[0].builder, [each.value.type for each in vectors]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kinds[0], kinds), name)
    return Vector(builder, builder.call(function, [each.value for each in vectors]))


def clamped(values: Vector, low: int, high: int) -> Vector:
    """Per element the nearest integer in low .. high, signed."""
    at_least = call(f"llvm.smax.v{WIDTH}i32", values, values.like(low))
    return call(f"llvm.smin.v{WIDTH}i32", at_least, values.like(high))


def splat(builder: Any, scalar: Any) -> Vector:
    """A scalar in every element."""
    vector = vector_of(scalar.type)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(vector_of(I32), [0] * WIDTH)
    return Vector(builder, builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros))


def picked(vector: Vector, order: list[int], other: Vector | None = None) -> Vector:
    """Elements of one vector, or of two that are numbered one behind the other, in this order."""
    second = ir.Constant(vector.value.type, ir.Undefined) if other is None else other.value
    indices = ir.Constant(ir.VectorType(I32, len(order)), order)
    return Vector(vector.builder, vector.builder.shuffle_vector(vector.value, second, indices))


def halves(vector: Vector) -> tuple[Vector, Vector]:
    """The lower and the upper eight elements."""
    return picked(vector, list(range(8))), picked(vector, list(range(8, WIDTH)))


def both(lower: Vector, upper: Vector) -> Vector:
    """One vector of two halves."""
    return picked(lower, list(range(WIDTH)), upper)


def pairs_of(values: Vector) -> Vector:
    """Eight i32, each of two neighbours of sixteen i16."""
    return Vector(values.builder, values.builder.bitcast(values.value, ir.VectorType(I32, 8)))


def blended(lower: Vector, upper: Vector) -> Vector:
    """i16: of eight i32 the lower halves of the first ones and the upper halves of the others, in turn."""
    halfwords = [Vector(each.builder, each.builder.bitcast(each.value, vector_of(I16))) for each in (lower, upper)]
    return picked(halfwords[0], [i + WIDTH * (i % 2) for i in range(WIDTH)], halfwords[1])


IN_TURN: Final = list(range(WIDTH))
IN_PAIRS: Final = [*range(0, WIDTH, 2), *range(1, WIDTH, 2)]
"""The number of each element of a vector; see Note [Pairs]."""


class Cpu:
    """What the machine that is compiled for can do; numba's key of its cache holds the same features.

    NUMBA_CPU_NAME alone means: none of them. NUMBA_CPU_FEATURES names them.
    """

    __slots__ = ("has_avx2", "has_avx512", "has_fma", "has_half", "in_pairs")

    def __init__(self, context: Any) -> None:
        self.in_pairs = False
        """Whether vectors hold even elements, then odd ones. See Note [Pairs]."""
        triple, _, features = context.codegen().magic_tuple()
        is_arm = str(triple).startswith(("aarch64", "arm64"))
        present = str(features).split(",")
        # Without the instruction LLVM calls a library function that the JIT cannot find: a crash when it is called.
        self.has_half = is_arm or "+f16c" in present
        self.has_fma = is_arm or "+fma" in present
        self.has_avx2 = "+avx2" in present
        self.has_avx512 = "+avx512f" in present

    def order_in_pairs(self) -> None:
        """Vectors hold even elements, then odd ones, if this is of use here: for kernels without arrays of 32 bits."""
        self.in_pairs = self.has_avx2 and not self.has_avx512

    def numbers(self, builder: Any) -> Vector:
        """The number of each element in its window, i32."""
        return Vector(builder, ir.Constant(vector_of(I32), IN_PAIRS if self.in_pairs else IN_TURN))

    def ordered(self, values: Vector) -> Vector:
        """A vector in the order of an array, in the order of vectors."""
        return picked(values, IN_PAIRS) if self.in_pairs else values

    def in_array_order(self, values: Vector) -> Vector:
        """The inverse of `ordered`."""
        return picked(values, [IN_PAIRS.index(i) for i in range(WIDTH)]) if self.in_pairs else values

    def as_upper_halves(self, raw: Vector) -> Vector:
        """i32 whose upper halves are these i16, the lower ones 0."""
        if not self.in_pairs:
            return raw.to("zext", I32) << 16
        pairs = pairs_of(raw)
        return both(pairs << 16, pairs & 0xFFFF0000)

    def upper_halves(self, bits: Vector) -> Vector:
        """i16 of i32."""
        if not self.in_pairs:
            return (bits >> 16).to("trunc", I16)
        even, odd = halves(bits)
        return blended(even >> 16, odd)

    def lower_halves(self, bits: Vector) -> Vector:
        """i16 of i32."""
        if not self.in_pairs:
            return bits.to("trunc", I16)
        even, odd = halves(bits)
        return blended(even, odd << 16)

    def added_halves(self, upper: Vector, lower: Vector) -> Vector:
        """i32: the upper half's i16 and, added to it, the lower one's as a signed number."""
        if not self.in_pairs:
            return (upper.to("zext", I32) << 16) + lower.to("sext", I32)
        sign = Vector(lower.builder, lower.builder.ashr(lower.value, lower.like(15).value))
        pairs, low = pairs_of(upper + sign), pairs_of(lower)
        return both(pairs_of(blended(low, pairs << 16)), pairs_of(blended(low >> 16, pairs)))

    def from_bytes(self, codes: Vector) -> Vector:
        """i32 of i8, unsigned."""
        if not self.in_pairs:
            return codes.to("zext", I32)
        pairs = Vector(codes.builder, codes.builder.bitcast(codes.value, ir.VectorType(I16, 8))).to("zext", I32)
        return both(pairs & 0xFF, pairs >> 8)

    def lookup(self, element: ir.Type, table: list[Any], index: Vector) -> Vector:
        """Per element the entry (F32 or I32) of a table of eight at the lowest three bits of `index` (i32)."""
        builder, is_float = index.builder, element == F32
        if self.has_avx512:
            twice = Vector(builder, ir.Constant(vector_of(element), table * 2))
            return call(f"llvm.x86.avx512.permvar.{'sf' if is_float else 'si'}.512", twice, index)
        if self.has_avx2:
            entries = Vector(builder, ir.Constant(ir.VectorType(element, 8), table))
            name = f"llvm.x86.avx2.{'permps' if is_float else 'permd'}"
            return both(*(call(name, entries, half) for half in halves(index)))
        like = Vector(builder, ir.Constant(vector_of(element), [0] * WIDTH))
        entries_left = [like.like(entry) for entry in table]
        for position in range(3):
            is_set = (index & (1 << position)).above(0)
            pairs = zip(entries_left[::2], entries_left[1::2], strict=True)
            entries_left = [is_set.choose(odd, even) for even, odd in pairs]
        return entries_left[0]

    def narrow_unsigned(self, values: Vector) -> Vector:
        """i8 of i32 in 0 .. 255."""
        if not self.has_avx512:
            # What saturates anyway costs AVX2 nothing, but spares it the masks with which it would cut off bits.
            values = clamped(values, 0, 255)
        return self.in_array_order(values.to("trunc", I8))

    def narrow_signed(self, values: Vector) -> Vector:
        """i8 of i32, saturated to -128 .. 127."""
        return self.in_array_order(clamped(values, -128, 127).to("trunc", I8))

    def any_above(self, values: Vector, limit: int) -> Any:
        """Whether an integer is greater, unsigned (i1)."""
        if self.has_avx2 and not self.has_avx512:
            values = call("llvm.umax.v8i32", *halves(values))
        above, builder = values.above(limit).value, values.builder
        mask = builder.bitcast(above, ir.IntType(above.type.count))
        return builder.icmp_unsigned("!=", mask, mask.type(0))

    def fma(self, a: Vector, b: Vector, c: Vector) -> Vector:
        """a * b + c, rounded once where the CPU can (torch's own kernels decide alike)."""
        if not self.has_fma:
            return a * b + c
        return call(f"llvm.fma.v{WIDTH}f32", a, b, c)

    def widen(self, dtype: str, raw: Vector) -> Vector:
        """fp32 of the bits of `dtype`: exact."""
        if dtype == "bf16":
            return self.as_upper_halves(raw).to("bitcast", F32)
        if dtype == "fp16":
            raw = raw.to("bitcast", F16).to("fpext", F32) if self.has_half else widen_half(raw)
        return self.ordered(raw)

    def round_to_even(self, dtype: str, value: Vector) -> Vector:
        """Bits of `dtype` of fp32 values, to nearest, ties to even."""
        if dtype == "fp32":
            return value
        if dtype == "bf16":
            bits = value.to("bitcast", I32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return value.is_nan().choose(bits.like(0x7FC0), rounded).to("trunc", I16)
        return value.to("fptrunc", F16).to("bitcast", I16) if self.has_half else round_half(value)

    def round_weights(self, dtype: str, master: Vector) -> Vector:
        """Bits of the working weights: bf16 to nearest with ties away from zero, so that the lower 16 bits of the
        master are a remainder from which it can be restored; the others as `round_to_even`."""
        if dtype != "bf16":
            return self.round_to_even(dtype, master)
        return self.upper_halves(with_one_nan(master.to("bitcast", I32)) + 0x8000)


def with_one_nan(bits: Vector) -> Vector:
    """Bits of an fp32 value, every NaN made 0x7FC00000: the only patterns that could overflow when rounded to bf16."""
    return bits.to("bitcast", F32).is_nan().choose(bits.like(0x7FC00000), bits)


def widen_half(raw: Vector) -> Vector:
    """fp32 of fp16 bits by integers and one exact product, for CPUs without the instruction."""
    bits = raw.to("zext", I32)
    magnitude = (bits & 0x7FFF) << 13
    # 2^112 moves the exponent from one bias to the other and normalises subnormals.
    finite = (magnitude.to("bitcast", F32) * 2.0**112).to("bitcast", I32)
    quiet_nan = (magnitude | 0x7FC00000) & 0x7FFFFFFF
    special = (bits & 0x7FFF).above(0x7C00).choose(quiet_nan, bits.like(0x7F800000))
    return ((bits & 0x7FFF).above(0x7BFF).choose(special, finite) | ((bits & 0x8000) << 16)).to("bitcast", F32)


def round_half(value: Vector) -> Vector:
    """fp16 bits of fp32 values, ties to even, for CPUs without the instruction."""
    bits = value.to("bitcast", I32)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    # Added to 0.5, whose last bit is the smallest subnormal of fp16, the sum is rounded where fp16 would be.
    subnormal = (magnitude.to("bitcast", F32) + 0.5).to("bitcast", I32) - 0x3F000000
    quiet_nan = ((magnitude >> 13) & 0x3FF) | 0x7E00
    special = magnitude.above(0x7F800000).choose(quiet_nan, bits.like(0x7C00))
    finite = magnitude.above(0x387FFFFF).choose(normal, subnormal)
    return (magnitude.above(0x477FFFFF).choose(special, finite) | ((bits >> 16) & 0x8000)).to("trunc", I16)


class Window:
    """Sixteen neighbouring elements of every array of a kernel, or the `count` last ones."""

    __slots__ = ("_builder", "_count", "index")

    def __init__(self, builder: Any, index: Any, count: Any | None) -> None:
        self._builder = builder
        self._count = count
        self.index = index
        """Position of the first element in the arrays, i64."""

    def existing(self, vector: Vector, numbers: Vector) -> Vector:
        """The vector, whose elements have these numbers, zero behind the last element of the arrays."""
        if self._count is None:
            return vector
        count = splat(self._builder, self._builder.trunc(self._count, I32))
        return count.above(numbers).choose(vector, vector.like(0))

    def whole(self) -> "Window":
        """Sixteen elements in any case: of an array that has room for them."""
        return Window(self._builder, self.index, None)

    def load(self, base: Any, element: ir.Type) -> Vector:
        """The elements at `base` (a pointer to `element`); zero behind the last one."""
        builder, vector = self._builder, vector_of(element)
        if self._count is None:
            return Vector(builder, builder.load(self._pointer(base, vector), align=size_of(element)))
        buffer = zeroed_variable(builder, vector)
        source = builder.gep(base, [self.index])
        cgutils.raw_memcpy(builder, builder.bitcast(buffer, base.type), source, self._count, size_of(element))
        return Vector(builder, builder.load(buffer))

    def store(self, base: Any, values: Vector) -> None:
        """Write the elements at `base`; nothing behind the last one."""
        builder, vector = self._builder, values.value.type
        if self._count is None:
            builder.store(values.value, self._pointer(base, vector), align=size_of(vector.element))
            return
        buffer = zeroed_variable(builder, vector)
        builder.store(values.value, buffer)
        target = builder.gep(base, [self.index])
        cgutils.raw_memcpy(builder, target, builder.bitcast(buffer, base.type), self._count, size_of(vector.element))

    def _pointer(self, base: Any, vector: ir.VectorType) -> Any:
        return self._builder.bitcast(self._builder.gep(base, [self.index]), vector.as_pointer())


def size_of(element: ir.Type) -> int:
    """Bytes of an element in memory: all that an array's address is a multiple of."""
    return {F32: 4, F64: 8, I8: 1, I16: 2, I32: 4}[element]


def zeroed_variable(builder: Any, vector: ir.VectorType) -> Any:
    """A pointer to a vector in the function's frame, zero from here on."""
    variable = cgutils.alloca_once(builder, vector)
    builder.store(ir.Constant(vector, [0] * WIDTH), variable)
    return variable


def each_window(builder: Any, start: Any, stop: Any, emit: Callable[[Window], None]) -> None:
    """Emit a loop over [start, stop): `emit` is called twice, for full windows and for the rest."""
    width = ir.Constant(I64, WIDTH)
    rest = builder.and_(builder.sub(stop, start), ir.Constant(I64, WIDTH - 1))
    body_stop = builder.sub(stop, rest)
    with cgutils.for_range_slice(builder, start, body_stop, width, intp=I64) as (index, _):
        emit(Window(builder, index, None))
    with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(I64, 0)), likely=False):
        emit(Window(builder, body_stop, rest))


def each_of(builder: Any, numel: Any, emit: Callable[[Window], None]) -> None:
    """`each_window` over [0, numel)."""
    each_window(builder, I64(0), numel, emit)
