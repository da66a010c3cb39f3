"""What one instruction of a compiled program costs: FLOPs, bytes of memory, collectives.

A multiply-add is two FLOPs. Only matmuls and convolutions count; the TPU compiler writes matmuls as
convolutions. A kernel of our own or of JAX is opaque to the compiler and has a formula here.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from middo_jax.models.attention.tpu_trees import blocks_of_kernel
from middo_jax.planning.chips import Chip
from middo_jax.planning.hlo import Computation, HloError, Instruction, Module, Shape

# Instructions without any cost of their own.
FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
        *("replica-id", "opt-barrier", "optimization-barrier", "domain", "add-dependency", "iota"),
    }
)
# Passes of a bfloat16 matrix unit over float32 operands, by the precision that JAX was given.
_PASSES = {"high": 3, "highest": 6}


class Matmul(NamedTuple):
    """A matmul: FLOPs, the size of its contraction, its two other sizes, and passes of the matrix unit."""

    flops: float
    contracted: int
    rows: int
    columns: int
    passes: int = 1

    def seconds(self, chip: Chip) -> float:
        """The time at the chip's attainable rate; parts of a matrix unit that stay empty count too."""
        tile = chip.matmul_tile

        def padding(size: int) -> float:
            return -(-size // tile) * tile / max(size, 1)

        waste = padding(self.contracted) * min(padding(self.rows), padding(self.columns))
        return self.passes * self.flops * waste / chip.matmul_rate


def matmul(computation: Computation, one: Instruction) -> Matmul:
    """The matmul of a dot or convolution."""
    left, right = (computation.instructions[name].shapes[0] for name in one.operands[:2])
    return _dot(one, left, right) if one.opcode == "dot" else _convolution(one, left, right)


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text or "")]


def _passes(one: Instruction, left: Shape) -> int:
    precision = one.attribute("operand_precision") or ""
    names = [name for name in _PASSES if re.search(rf"\b{name}\b", precision)]
    return max((_PASSES[name] for name in names), default=1) if left.dtype == "f32" else 1


def _dot(one: Instruction, left: Shape, right: Shape) -> Matmul:
    contracted = math.prod(left.dims[i] for i in _numbers(one.attribute("lhs_contracting_dims")))
    batch = math.prod(left.dims[i] for i in _numbers(one.attribute("lhs_batch_dims")))
    size = one.shapes[0].size
    rows, columns = (shape.size // max(contracted * batch, 1) for shape in (left, right))
    return Matmul(2.0 * size * contracted, contracted, rows, columns, _passes(one, left))


def _convolution(one: Instruction, left: Shape, right: Shape) -> Matmul:
    """As XLA's HandleConvolution: positions where a window is over padding or a hole do not count."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", one.attribute("dim_labels") or "")
    if labels is None:
        raise HloError(f"{one.name}: a convolution without dim_labels")
    lhs, rhs, out = labels.groups()
    output = one.shapes[0]
    window = one.attribute("window") or "{}"
    spatial = sorted(set(rhs) - {"i", "o"})
    fields = {
        name: (re.search(rf"\b{name}=([\dx_\-]+)", window) or [None, None])[1]
        for name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    }

    def field(name: str, i: int, default: str) -> str:
        text = fields[name]
        return default if text is None else text.split("x")[i]

    valid = 1
    for i, axis in enumerate(spatial):
        low, _ = (int(n) for n in field("pad", i, "0_0").split("_"))
        valid *= _valid(
            size=left.dims[lhs.index(axis)],
            window=right.dims[rhs.index(axis)],
            outputs=output.dims[out.index(axis)],
            stride=int(field("stride", i, "1")),
            low=low,
            lhs_dilate=int(field("lhs_dilate", i, "1")),
            rhs_dilate=int(field("rhs_dilate", i, "1")),
        )
    inputs = right.dims[rhs.index("i")]  # those of one feature group
    # The output's batch axis is divided by batch_group_count already.
    batch, outputs = output.dims[out.index("b")], output.dims[out.index("f")]
    return Matmul(2.0 * batch * outputs * inputs * valid, inputs, batch, outputs, _passes(one, left))


def _valid(
    *, size: int, window: int, outputs: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Number of pairs (output position, window position) over a real input position."""
    last, found = (size - 1) * lhs_dilate, 0
    for w in range(window):
        shift = w * rhs_dilate - low
        if lhs_dilate == 1:  # 0 <= o * stride + shift <= last
            first_o = max(0, -(shift // stride))
            last_o = min(outputs - 1, (last - shift) // stride)
            found += max(0, last_o - first_o + 1)
        else:
            at = (o * stride + shift for o in range(outputs))
            found += sum(0 <= p <= last and p % lhs_dilate == 0 for p in at)
    return found


def matmuls(module: Module, computation: Computation) -> list[Matmul]:
    """All matmuls of a fusion's computation."""
    found: list[Matmul] = []
    for one in computation.instructions.values():
        if one.opcode in ("dot", "convolution"):
            found.append(matmul(computation, one))
        elif one.opcode in ("fusion", "call"):
            name = "calls" if one.opcode == "fusion" else "to_apply"
            found += matmuls(module, module.called(one, name))
    return found


def kernel(computation: Computation, one: Instruction, window: int | None) -> list[Matmul]:
    """The matmuls of a Pallas kernel that is known: splash attention, forward and backward.

    It computes whole blocks of 512 queries and keys and skips those without any attended pair: below the
    diagonal, up to `window` positions back. Scores and outputs are 2 matmuls, the gradients of keys and
    values 4, the gradient of queries 3 (dkv recomputes the scores, dq does too).

    Args:
      computation: where the call is.
      one: the call.
      window: how far back the attention looks, in positions; None: to the beginning.

    Raises:
      HloError: the kernel is unknown.
    """
    name = f"{one.name} {one.op_name} {one.attributes}"
    if "tree_attention" in name:
        return _tree_kernel(computation, one, name)
    known = {"splash_mha_dkv": 4, "splash_mha_dq": 3, "splash_mha_fwd": 2, "splash_mqa_fwd": 2}
    count = next((n for text, n in known.items() if text in name), None)
    if count is None:
        raise HloError(f"{one.name}: no formula for this kernel ({one.op_name or 'unnamed'})")
    arrays = [
        computation.instructions[o].shapes[0] for o in one.operands if computation.instructions[o].shapes
    ]
    # Of [.., h, t, e]: the queries have the most heads.
    query = max((a for a in arrays if len(a.dims) in (3, 4)), key=lambda a: a.size)
    *batch, length, width = query.dims
    block = next((size for size in (512, 256, 128) if length % size == 0), length)
    reach = length if window is None else min(window, length)
    back = -(-(reach - 1) // block)
    blocks = sum(min(i, back) + 1 for i in range(length // block))
    flops = 2.0 * math.prod(batch) * blocks * block * block * width
    return [Matmul(flops, width, block, block)] * count


def _tree_kernel(computation: Computation, one: Instruction, name: str) -> list[Matmul]:
    """Scores and outputs of the kernel for trees, of all blocks that it may read."""
    arrays = [computation.instructions[o].shapes[0] for o in one.operands]
    b, kv_heads, group, length, width = max(arrays, key=lambda a: len(a.dims)).dims  # the queries
    found = blocks_of_kernel(name, length)
    assert found is not None  # the name begins like that of the kernel
    pairs, block = found
    flops = 2.0 * b * kv_heads * group * pairs * block * block * width
    return [Matmul(flops, width, block, block)] * 2


def memory_bytes(module: Module, computation: Computation, one: Instruction) -> float:
    """Bytes of HBM that an instruction reads and writes; slices and updates in place count their own size."""
    shapes = [computation.instructions[name] for name in one.operands]
    match one.opcode:
        case "fusion":
            return _fusion_bytes(module, computation, one)
        case "dynamic-slice" | "slice" | "gather":
            return 2 * one.bytes if shapes and _in_memory(shapes[0]) else one.bytes
        case "dynamic-update-slice":
            return 2 * shapes[1].bytes
        case "scatter":
            return 3 * shapes[-1].bytes
        case "copy-start" | "slice-start" | "dynamic-slice-start":
            # (target, source, context): one side is usually on the chip.
            arrays = one.shapes[:2]
            moved = min(shape.bytes for shape in arrays)
            return moved * sum(shape.in_memory for shape in arrays)
        case "copy-done" | "slice-done" | "dynamic-slice-done":
            return 0.0
    return one.bytes + sum(shape.bytes for shape in dict.fromkeys(shapes))


def _in_memory(one: Instruction) -> bool:
    return any(shape.in_memory for shape in one.shapes)


_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy", "convert", "transpose")


def _fusion_bytes(module: Module, computation: Computation, one: Instruction) -> float:
    called = module.called(one)
    total = sum(
        _read(module, called, parameter.name, parameter)
        for parameter, operand in zip(called.parameters, one.operands, strict=True)
        if _in_memory(computation.instructions[operand])
    )
    return total + _written(called, one)


def _read(module: Module, called: Computation, name: str, parameter: Instruction) -> float:
    """Bytes that a fusion reads of a parameter: the slices if only slices of it are used, else all."""
    whole, total = sum(shape.bytes for shape in parameter.shapes), 0.0
    for user in called.users[name]:
        if user.opcode in _SLICES and user.operands[0] == name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # in place
        elif user.opcode == "bitcast":
            total += _read(module, called, user.name, parameter)
        elif user.opcode == "fusion":
            inner = module.called(user)
            for i, operand in enumerate(user.operands):
                if operand == name:
                    total += _read(module, inner, inner.parameters[i].name, parameter)
        elif user.opcode == "tuple" and called.root == user.name:
            continue
        else:
            return whole
    return min(total, whole)


def _written(called: Computation, one: Instruction) -> float:
    """Bytes that a fusion writes: the update where its result is an updated array."""
    root = called.instructions[called.root]
    results = [called.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(one.shapes):
        return one.bytes
    total = 0.0
    for shape, result in zip(one.shapes, results, strict=True):
        while result.opcode in _VIEWS[:2]:
            result = called.instructions[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            update = called.instructions[result.operands[1]]
            total += sum(s.bytes for s in update.shapes)
        elif shape.in_memory:
            total += shape.bytes
    return total
