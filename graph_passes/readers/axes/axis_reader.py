"""Work out which axis of a value is which: the proof that a form multiplies and sums along the axes that it seems to.

Readers follow an MoE block by its ops. Whether a Transpose, a Reshape or the subscripts of an Einsum then put tokens,
experts and channels where they belong is proven here.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import is_whole, operand, producer, source
from graph_passes.readers.axes.names import (
    ELEMENTWISE,
    EXPERTS,
    ONE,
    PARTS,
    SLOTS,
    TOKENS,
    WIDTH,
    Axes,
    Axis,
    joined,
    same,
    text,
)
from graph_passes.readers.axes.operands import axes_of, ints, subscripts
from graph_passes.record.block import FormError

_UNDEALT: Axis = ("?",)


class AxisReader:
    """Works out the axes of values from those of a few that are known.

    ``summed`` is the axis that a sum may do away with.
    """

    def __init__(self, summed: Axis) -> None:
        self._summed = summed[0]
        self._sizes: dict[str, int] = {}
        self._told: dict[int, Axes] = {}
        self._known: dict[int, Axes] = {}

    def size(self, axis: Axis, length: int) -> None:
        """``axis``, which has one name, is this long; tokens have no length."""
        self._sizes[axis[0]] = length

    def know(self, tensor: gs.Tensor, *axes: Axis) -> None:
        """``tensor`` has these axes."""
        self._told[id(tensor)] = axes

    def of(self, tensor: gs.Tensor) -> Axes:
        """The axes of ``tensor``.

        Raises:
            FormError: an op puts an axis where it does not belong, or is none that an expert has.
        """
        if id(tensor) not in self._known:
            told = self._told.get(id(tensor))
            axes = self._work_out(tensor) if told is None else told
            self._known[id(tensor)] = tuple(self._without_ones(axis) for axis in axes)
        return self._known[id(tensor)]

    def _without_ones(self, axis: Axis) -> Axis:
        """The same axis where a name, such as that of a single expert, is of length 1."""
        return tuple(name for name in axis if self._sizes.get(name) != 1)

    def expect(self, tensor: gs.Tensor, *axes: Axis) -> None:
        """Refuse a value that has other axes.

        Raises:
            FormError: with the axes that it has.
        """
        found = self.of(tensor)
        if found != tuple(self._without_ones(axis) for axis in axes):
            raise FormError(f"a value has the axes {text(found)}, expected {text(axes)}", producer(tensor) or tensor)

    def _work_out(self, tensor: gs.Tensor) -> Axes:
        node = producer(tensor)
        if node is None:
            if all(size == 1 for size in tensor.shape or ()) and isinstance(tensor, gs.Constant):
                return (ONE,) * len(tensor.shape)
            raise FormError("a value comes from outside of the experts", tensor)
        if node.op in ELEMENTWISE:
            return self._broadcast(node, [tensor for tensor in node.inputs if not tensor.is_empty()])
        if node.op in PARTS:
            return self._part(node)
        rule = _RULES.get(node.op)
        if rule is None:
            raise FormError(f"{node.op} stands among the experts", node)
        try:
            return rule(self, node)
        except (IndexError, ValueError) as error:  # the checker knows no ranks
            raise FormError(f"{node.op} does not fit the axes that it gets", node) from error

    def _broadcast(self, node: gs.Node, tensors: Sequence[gs.Tensor]) -> Axes:
        return joined(node, [self.of(tensor) for tensor in tensors])

    def _part(self, node: gs.Node) -> Axes:
        axes = self.of(node.inputs[0])
        if node.op == "Slice" and is_whole(node):
            return axes
        along = self._parted_axis(node)
        if node.op != "SequenceAt" and axes[along % len(axes)] != WIDTH:
            raise FormError(f"{node.op} parts the axes {text(axes)} elsewhere than between gate and up", node)
        return axes

    def _parted_axis(self, node: gs.Node) -> int:
        if node.op != "Slice":
            return int(node.attrs.get("axis", 0))
        along = ints(operand(node, 3)) if len(node.inputs) > 3 else [0]
        if len(along) != 1:
            raise FormError("a Slice cuts more than one axis", node)
        return along[0]

    def _unsqueeze(self, node: gs.Node) -> Axes:
        axes = self.of(node.inputs[0])
        places = axes_of(node)
        rank = len(axes) + len(places)
        result = list(axes)
        for place in sorted(place % rank for place in places):
            result.insert(place, ONE)
        return tuple(result)

    def _squeeze(self, node: gs.Node) -> Axes:
        axes = self.of(node.inputs[0])
        places = {place % len(axes) for place in axes_of(node)} or {i for i, axis in enumerate(axes) if axis == ONE}
        if any(axes[place] != ONE for place in places):
            raise FormError(f"Squeeze takes an axis of {text(axes)} that is not of length 1", node)
        return tuple(axis for index, axis in enumerate(axes) if index not in places)

    def _transpose(self, node: gs.Node) -> Axes:
        axes = self.of(node.inputs[0])
        perm = node.attrs.get("perm", range(len(axes))[::-1])
        return tuple(axes[index] for index in perm)

    def _expand(self, node: gs.Node) -> Axes:
        """Repeated for what is summed; as before where that is not known: what it meets expands it anyway."""
        axes = self.of(node.inputs[0])
        try:
            shape = self._numbers(node.inputs[1])
        except FormError:
            return axes
        axes = (ONE,) * (len(shape) - len(axes)) + axes
        return tuple(
            self._repeated(node, axis, size) if axis == ONE else axis for axis, size in zip(axes, shape, strict=True)
        )

    def _tile(self, node: gs.Node) -> Axes:
        axes, repeats = self.of(node.inputs[0]), self._numbers(node.inputs[1])
        return tuple(self._repeated(node, axis, count) for axis, count in zip(axes, repeats, strict=True))

    def _repeated(self, node: gs.Node, axis: Axis, count: int) -> Axis:
        if count in (1, -1):
            return axis
        wanted = self._sizes[self._summed]
        if count != wanted:
            raise FormError(f"{node.op} repeats an axis {count} times, expected {wanted} times", node)
        return (self._summed, *axis)

    def _reshape(self, node: gs.Node) -> Axes:
        axes, shape = self.of(node.inputs[0]), self._numbers(node.inputs[1])
        if shape.count(-1) > 1:
            raise FormError("more than one length of a shape is computed", node)
        if 0 in shape and not node.attrs.get("allowzero", 0):
            kept = {place: axes[place] for place, size in enumerate(shape) if size == 0}
            prefix = len(kept)
            if set(kept) != set(range(prefix)):
                raise FormError(f"Reshape to {shape} keeps axes behind others", node)
            return axes[:prefix] + self._regroup(node, axes[prefix:], shape[prefix:])
        return self._regroup(node, axes, shape)

    def _regroup(self, node: gs.Node, axes: Axes, shape: Sequence[int]) -> Axes:
        """The names of ``axes`` dealt out anew to axes of these lengths, one of which may be -1."""
        names = [name for axis in axes for name in axis]
        hole = shape.index(-1) if -1 in shape else len(shape)
        front = [self._deal(names, size) for size in shape[:hole]]
        names.reverse()
        back = [self._deal(names, size)[::-1] for size in reversed(shape[hole + 1 :])]
        rest = [tuple(reversed(names))] if hole < len(shape) else []
        if _UNDEALT in (*front, *back) or (names and not rest):
            raise FormError(f"Reshape makes {list(shape)} of the axes {text(axes)}", node)
        return (*front, *rest, *reversed(back))

    def _deal(self, names: list[str], size: int) -> Axis:
        """Take names from the front of ``names`` until their lengths multiply to ``size``."""
        taken: list[str] = []
        product = 1
        while names and product < size and names[0] in self._sizes:
            product *= self._sizes[names[0]]
            taken.append(names.pop(0))
        return tuple(taken) if product == size else _UNDEALT

    def _numbers(self, tensor: gs.Tensor) -> list[int]:
        """A shape, or some of its lengths; -1 for the number of tokens, and for what is not known beside what is.

        Raises:
            FormError: nothing is known.
        """
        node = producer(tensor)
        if node is None:
            return ints(tensor)
        match node.op:
            case "Cast" | "Identity" | "Reshape" | "Squeeze" | "Unsqueeze":
                return self._numbers(node.inputs[0])
            case "Shape":
                lengths = [self._length(axis) for axis in self.of(node.inputs[0])]
                return lengths[node.attrs.get("start", 0) : node.attrs.get("end", len(lengths))]
            case "Gather":
                lengths = self._numbers(node.inputs[0])
                return [lengths[index] for index in ints(node.inputs[1])]
            case "Concat":
                return [number for part in node.inputs for number in self._numbers_or_hole(part)]
        raise FormError("a shape is computed", node)

    def _numbers_or_hole(self, part: gs.Tensor) -> list[int]:
        try:
            return self._numbers(part)
        except FormError:
            return [-1]

    def _length(self, axis: Axis) -> int:
        return -1 if TOKENS[0] in axis else math.prod(self._sizes[name] for name in axis)

    def _matmul(self, node: gs.Node) -> Axes:
        left, right = (self.of(tensor) for tensor in node.inputs)
        return self._product(node, left, right)

    def _gather(self, node: gs.Node) -> Axes:
        """Rows of axis 0, one for each id."""
        if node.attrs.get("axis", 0) != 0:
            raise FormError("Gather takes from another axis than the experts'", node)
        return (*self.of(node.inputs[1]), *self.of(node.inputs[0])[1:])

    def _gather_nd(self, node: gs.Node) -> Axes:
        """Rows of axis 0, one for each id, which have an axis of their own."""
        ids = self.of(node.inputs[1])
        if node.attrs.get("batch_dims", 0) or ids[-1:] != (ONE,):
            raise FormError("GatherND takes by more than one index", node)
        return (*ids[:-1], *self.of(node.inputs[0])[1:])

    def _gather_elements(self, node: gs.Node) -> Axes:
        """K experts of each token, by ids that are the same for all channels."""
        axes, ids = self.of(node.inputs[0]), self.of(source(node.inputs[1], {"Expand"}))
        along = node.attrs.get("axis", 0) % len(axes)
        wanted = tuple(SLOTS if index == along else axis for index, axis in enumerate(axes))
        if axes[along] != EXPERTS or len(ids) != len(axes) or joined(node, [wanted, ids]) != wanted:
            raise FormError(f"GatherElements takes from the axes {text(axes)} by ids {text(ids)}", node)
        return wanted

    def _gemm(self, node: gs.Node) -> Axes:
        left, right = (self.of(tensor) for tensor in node.inputs[:2])
        left = left[::-1] if node.attrs.get("transA", 0) else left
        right = right[::-1] if node.attrs.get("transB", 0) else right
        return self._product(node, left, right)

    def _product(self, node: gs.Node, left: Axes, right: Axes) -> Axes:
        if min(len(left), len(right)) < 2 or left[-1] != right[-2]:
            raise FormError(f"{node.op} multiplies the axes {text(left)} by {text(right)}", node)
        return (*joined(node, [left[:-2], right[:-2]]), left[-2], right[-1])

    def _einsum(self, node: gs.Node) -> Axes:
        terms, result = subscripts(node)
        meaning: dict[str, Axis] = {}
        for term, tensor in zip(terms, node.inputs, strict=True):
            axes = self.of(tensor)
            if len(term) != len(axes):
                raise FormError(f"Einsum calls the axes {text(axes)} {term!r}", node)
            for letter, axis in zip(term, axes, strict=True):
                meaning[letter] = same(node, meaning.get(letter, ONE), axis)
        alone = {letter for letter in meaning if letter not in result and sum(letter in term for term in terms) == 1}
        if any(meaning[letter] not in ((self._summed,), ONE) for letter in alone):
            raise FormError("Einsum sums over an axis that is not the experts'", node)
        return tuple(meaning[letter] for letter in result)

    def _reduce_sum(self, node: gs.Node) -> Axes:
        axes = self.of(node.inputs[0])
        places = {place % len(axes) for place in axes_of(node)}
        if not places or any(axes[place] not in ((self._summed,), ONE) for place in places):
            raise FormError(f"ReduceSum sums the axes {text(axes)} over another than {self._summed}", node)
        if node.attrs.get("keepdims", 1):
            return tuple(ONE if index in places else axis for index, axis in enumerate(axes))
        return tuple(axis for index, axis in enumerate(axes) if index not in places)


_RULES: Mapping[str, Callable[[AxisReader, gs.Node], Axes]] = {
    "Einsum": AxisReader._einsum,
    "Expand": AxisReader._expand,
    "Gather": AxisReader._gather,
    "GatherElements": AxisReader._gather_elements,
    "GatherND": AxisReader._gather_nd,
    "Gemm": AxisReader._gemm,
    "MatMul": AxisReader._matmul,
    "ReduceSum": AxisReader._reduce_sum,
    "Reshape": AxisReader._reshape,
    "Squeeze": AxisReader._squeeze,
    "Tile": AxisReader._tile,
    "Transpose": AxisReader._transpose,
    "Unsqueeze": AxisReader._unsqueeze,
}
