"""Reads the text of a compiled program: computations, instructions, shapes, and how often each loop runs.

    module = parse(compiled.as_text())
    trip_count(module, module.entry.instructions["while.3"])

XLA's own cost analysis counts the body of a loop once, and the TPU compiler writes no trip counts. So the
number of iterations is read here, from the loop's condition, its counter's initial value and its step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# Of a computation; one that another core runs, such as a v6e's SparseCore, names its thread.
_END = re.compile(r'^\}(?:, execution_thread="[^"]*")?\s*$')
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


class HloError(ValueError):
    """The text is not that of a compiled program, or a part of it cannot be read."""


class Shape(NamedTuple):
    """One array.

    Attributes:
      dtype: XLA's name, such as bf16.
      dims: sizes of its axes.
      in_memory: False if the array is in on-chip memory (S(1) and higher in TPU layouts), not in HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    in_memory: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without the padding of tiles."""
        return self.size * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: its name within the computation.
      opcode: such as fusion, dot, while.
      shapes: arrays of its result, those of a tuple one after the other.
      operands: names of its operands.
      inside: text between the parentheses, such as the value of a constant.
      attributes: text after them.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str

    @property
    def op_name(self) -> str:
        """The scopes and primitive of JAX that it comes from; "" if unknown."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimated cycles; 0 where it writes none."""
        found = _CYCLES.search(self.attributes)
        return int(found.group(1)) if found else 0

    def attribute(self, name: str) -> str | None:
        """An attribute's value: up to the next comma, or the whole block in braces or brackets."""
        return _attribute(self.attributes, name)

    def names(self, attribute: str) -> tuple[str, ...]:
        """Names of the computations in an attribute, such as calls or branch_computations."""
        return tuple(_NAME.findall(self.attribute(attribute) or ""))

    @property
    def bytes(self) -> float:
        """Bytes of its result in HBM."""
        return sum(shape.bytes for shape in self.shapes if shape.in_memory)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run if the program is scheduled."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters by their number."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.inside))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each instruction's result."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found[operand].append(one)
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction, attribute: str = "calls") -> Computation:
        """The one computation that an attribute names."""
        [name] = instruction.names(attribute)
        return self.computations[name]


def parse(text: str) -> Module:
    """Reads a program's text.

    Raises:
      HloError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, is_entry, root = None, None, False, ""
    instructions: dict[str, Instruction] = {}
    for line in _joined(text):
        if name is None:
            if header := _HEADER.match(line):
                is_entry, name, root, instructions = bool(header.group(1)), header.group(2), "", {}
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
            entry, name = computations[name] if is_entry else entry, None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found.group(2), found.group(3))
            instructions[instruction.name] = instruction
            root = instruction.name if found.group(1) else root
    if entry is None:
        raise HloError("the text has no ENTRY computation; it is not that of a compiled program")
    return Module(computations, entry)


def _joined(text: str) -> Iterator[str]:
    """The lines; those of a kernel's attributes, which contain line ends, as one with their instruction."""
    parts: list[str] = []
    for line in text.splitlines():
        if parts and not _INSTRUCTION.match(line) and not _END.match(line):
            parts.append(line)
            continue
        if parts:
            yield " ".join(parts)
        parts = [line] if _INSTRUCTION.match(line) else []
        if not parts:
            yield line
    if parts:
        yield " ".join(parts)


def _instruction(name: str, text: str) -> Instruction:
    if text.startswith("("):
        end = _closing(text, 0) + 1
    else:
        end = text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing(f"({rest}", 0) - 1
    inside = rest[:close]
    return Instruction(
        name, opcode, _shapes(text[:end]), tuple(_NAME.findall(inside)), inside, rest[close + 1 :]
    )


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise HloError(f"unbalanced brackets in {text[start : start + 80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), not _ON_CHIP.search(layout))
        for dtype, dims, layout in _SHAPE.findall(text)
    )


_ON_CHIP = re.compile(r"S\([1-9]\d*\)")


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    if digits is None:
        raise HloError(f"unknown dtype {dtype!r}")
    return int(digits.group())


def _attribute(text: str, name: str) -> str | None:
    found = re.search(rf"[, ]{re.escape(name)}=", text)
    if found is None:
        return None
    start = found.end()
    if text[start] in "{[":
        end = _closing(text, start) + 1
        # An iota list continues after its first block: [2,8]<=[16]T(1,0).
        tail = re.match(r"<=\[[\d,]*\](?:T\([\d,]*\))?", text[end:])
        return text[start : end + (tail.end() if tail else 0)]
    return re.split(r", | metadata=", text[start:], maxsplit=1)[0]


class _Affine(NamedTuple):
    """A constant (`element` None), or an element of the loop's tuple plus a constant."""

    element: int | None
    plus: int


def trip_count(module: Module, inside: Computation, loop: Instruction) -> int | None:
    """Returns how often a while loop runs; None if that depends on data.

    The CPU compiler writes the number beside the loop; the TPU compiler does not.

    Args:
      module: the program.
      inside: the computation that contains the loop.
      loop: the instruction.
    """
    if written := _WRITTEN_COUNT.search(loop.attributes):
        return int(written.group(1))
    return count_by_condition(module, inside, loop)


_WRITTEN_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count_by_condition(module: Module, inside: Computation, loop: Instruction) -> int | None:
    """As `trip_count`, from the condition, the counter's initial value and its step alone."""
    condition, body = module.called(loop, "condition"), module.called(loop, "body")
    comparison = _comparison(module, condition)
    if comparison is None:
        return None
    left, right, direction = comparison
    if left.element is None:
        left, right, direction = right, left, _MIRRORED[direction]
    start = _initial(module, inside, loop, left.element)
    bound = (
        right.plus if right.element is None else _plus(_initial(module, inside, loop, right.element), right)
    )
    step = _value(module, body, _element(body, left.element), {})
    if right.element is not None:  # the bound is carried through the loop and must not change in it
        carried = _value(module, body, _element(body, right.element), {})
        bound = bound if carried == _Affine(right.element, 0) else None
    if start is None or bound is None or step is None or step.element != left.element or not step.plus:
        return None
    return _count(start + left.plus, bound, step.plus, direction)


_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}


def _plus(value: int | None, affine: _Affine) -> int | None:
    return None if value is None else value + affine.plus


def _count(start: int, bound: int, step: int, direction: str) -> int | None:
    distance = (bound - start) if step > 0 else (start - bound)
    match direction:
        case "LT" | "GT" | "NE":
            return max(0, -(-distance // abs(step)))
        case "LE" | "GE":
            return max(0, distance // abs(step) + 1)
    return None


def _comparison(module: Module, condition: Computation) -> tuple[_Affine, _Affine, str] | None:
    """Both sides of the condition and its direction; None if it is not one comparison of whole numbers."""
    computation, instruction = condition, condition.instructions[condition.root]
    arguments: dict[int, _Affine | None] = {}
    while instruction.opcode == "fusion":
        arguments = {
            i: _value(module, computation, operand, arguments)
            for i, operand in enumerate(instruction.operands)
        }
        computation = module.called(instruction)
        instruction = computation.instructions[computation.root]
    if instruction.opcode != "compare":
        return None
    left, right = (_value(module, computation, operand, arguments) for operand in instruction.operands)
    direction = instruction.attribute("direction")
    if left is None or right is None or direction is None or {left.element, right.element} == {None}:
        return None
    return left, right, direction


def _element(body: Computation, index: int | None) -> str:
    """The name of an element of the tuple that a loop's body returns."""
    root = body.instructions[body.root]
    assert index is not None
    return root.operands[index] if root.opcode == "tuple" else body.root


def _initial(module: Module, inside: Computation, loop: Instruction, index: int | None) -> int | None:
    before = inside.instructions[loop.operands[0]]
    if before.opcode != "tuple" or index is None:
        return None
    value = _value(module, inside, before.operands[index], {})
    return value.plus if value is not None and value.element is None else None


def _value(
    module: Module, computation: Computation, name: str, arguments: dict[int, _Affine | None]
) -> _Affine | None:
    """An integer as a constant or an element of the loop's tuple plus a constant; None if it is neither.

    Args:
      module: the program.
      computation: where the instruction is.
      name: of the instruction.
      arguments: values of the computation's parameters, if it is a fusion's.
    """
    one = computation.instructions[name]

    def value(i: int) -> _Affine | None:
        return _value(module, computation, one.operands[i], arguments)

    match one.opcode:
        case "constant":
            return _Affine(None, int(one.inside)) if re.fullmatch(r"-?\d+", one.inside) else None
        case "get-tuple-element":
            source = computation.instructions[one.operands[0]]
            index = int(one.attribute("index") or -1)
            return _Affine(index, 0) if source.opcode == "parameter" else None
        case "parameter":
            return arguments.get(int(one.inside))
        case "copy" | "bitcast" | "convert" | "reshape" | "broadcast" | "copy-start" | "copy-done":
            return value(0)
        case "add" | "subtract":
            left, right = value(0), value(1)
            if left is None or right is None:
                return None
            if one.opcode == "subtract":
                return None if right.element is not None else _Affine(left.element, left.plus - right.plus)
            if None not in (left.element, right.element):
                return None
            element = right.element if left.element is None else left.element
            return _Affine(element, left.plus + right.plus)
        case "fusion":
            called = module.called(one)
            inner = {i: value(i) for i in range(len(one.operands))}
            return _value(module, called, called.root, inner)
    return None
