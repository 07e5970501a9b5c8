"""int8 activations: what is multiplied by an int8 matrix is rounded to int8 too, so that it is a product of int8.

``q = round(x / s)``, ``s = amax / 127``, one ``s`` for a value of the graph, symmetric, as QuantizeLinear and
DequantizeLinear in front of the product: TensorRT takes the three for one int8 GEMM. ``amax`` is the largest |x| that
task data show, or a percentile of |x|. The graph that is observed is the result itself, before its activations are
rounded: weights are int8 by then, all else is float.

Values that were only moved (split, gathered, reshaped) share the range of what they were moved from, so all experts of
a layer read with one scale. What enters the down projection of an expert in form ``sorted`` has a range of its own, and
one that no token of the data reaches is refused. Matrices whose scales are in blocks stay products of floats: int8
GEMMs know a scale for each output channel, and ONNX Runtime 1.31 fuses such a product and multiplies by the scale of
another block, or fails. In forms ``dense`` and ``gather`` that is so for stacked experts: for all of them but the first
projections in ``dense``.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graph_passes.model_file import model_path
from graph_passes.quantization.rest import PRODUCTS
from graph_passes.weights.weight import Array
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.errors import UserError
from moe_spec.manifest import MODEL, OBSERVED
from moe_spec.runner import Runner, error_between

LEVELS = 127
MOVES = frozenset({"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"})
MOVES |= {"Unsqueeze"}
"""Ops that give values which they read."""

SHIFT = 15
"""Bits of a float32 that a bin of `Range` does not tell: 8 bits of the fraction remain, bins 1/256 wide."""

SMALLEST = float(np.finfo(np.float32).tiny)
"""What is smaller has no digits to round: the first bins of `Range` hold zeros and the like."""

_OFF = "leave --activations out, or choose another --calibration"


@dataclasses.dataclass(frozen=True)
class Activations:
    """How activations become int8.

    Attributes:
        data: task data whose values tell the ranges, as the graph takes them.
        name: of the data, for messages.
        percentile: of |x| that is in range; the rest is clipped. 100: all of it is.
        batch_size: examples a run.
    """

    data: Dataset
    name: str
    percentile: float = 100.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse a percentile that is none.

        Raises:
            UserError: it is not in (0, 100].
        """
        if not 0 < self.percentile <= 100:
            raise UserError(f"there is no percentile {self.percentile:g}", hint="--percentile is above 0, at most 100")

    @classmethod
    def load(cls, name: str | None, calibration: Path | None, model: Path, percentile: float = 100.0) -> Self | None:
        """As a user gave it, for an ONNX file or a model directory; None where nothing was given.

        Raises:
            UserError: another format than int8, one option without the other, or data that cannot be read.
        """
        if name not in (None, "int8"):
            raise UserError(f"activations cannot be {name}", hint="--activations int8")
        if name is not None and calibration is None:
            raise UserError("int8 activations need data that show their ranges", hint="--calibration DATA.npz")
        if calibration is None and percentile == 100:
            return None
        if calibration is None:
            raise UserError("--percentile is for activations that become int8", hint="--activations int8")
        if name is None:
            raise UserError("--calibration is for activations that become int8", hint="--activations int8")
        data = load_dataset(calibration, model_path(model))
        return cls(data, str(calibration), percentile)


class Range:
    """How large the numbers of one value are, batch by batch, whatever the order of batches.

    >>> seen = Range()
    >>> seen.add(np.array([1.0, -2.0, 3.0, -100.0], np.float32))
    >>> seen.largest(100), round(seen.largest(75), 2)
    (100.0, 3.01)
    """

    def __init__(self) -> None:
        self._counts = np.zeros(1 << (32 - SHIFT - 1), np.int64)
        self._largest = np.float32(0)

    def add(self, values: Array) -> None:
        """Count ``values``."""
        sizes = np.abs(values.astype(np.float32)).ravel()
        self._counts += np.bincount(sizes.view(np.uint32) >> SHIFT, minlength=len(self._counts))
        self._largest = np.maximum(self._largest, sizes.max(initial=0))

    @property
    def count(self) -> int:
        """Numbers that were seen."""
        return int(self._counts.sum())

    def largest(self, percentile: float) -> float:
        """So many percent of the numbers are no larger, up to the width of a bin; not finite if a number is not."""
        if percentile == 100 or not np.isfinite(self._largest):
            return float(self._largest)
        inside = np.searchsorted(np.cumsum(self._counts), np.ceil(self.count * percentile / 100))
        end = np.uint32((int(inside) << SHIFT) | ((1 << SHIFT) - 1)).view(np.float32)
        return float(min(end, self._largest))


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What became int8.

    Attributes:
        ranges: the largest |x| that is in range, by the name of the value; nothing where all was int8 before.
        error: largest difference that this makes on the first batch, relative to an output's largest magnitude.
        examples: how many that has.
    """

    ranges: Mapping[str, float]
    error: float
    examples: int


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product by an int8 matrix: ``place`` in the graph, what it reads, and what that was before it was moved."""

    place: int
    reads: str
    origin: str
    dtype: int


def round_activations(directory: Path, how: Activations, runner: Runner) -> Rounded:
    """Let the products by int8 matrices in model.onnx and observed.onnx of ``directory`` read int8; weights stay.

    Raises:
        UserError: no matrix is int8, or of what a product reads the data show nothing, zeros, or no finite numbers.
    """
    model = onnx.load(directory / MODEL, load_external_data=False)
    products = _products(model)
    if not products:
        if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            return Rounded({}, 0.0, 0)
        raise UserError(
            "no product multiplies by an int8 matrix with a scale for each output, so no activation can be int8",
            hint="ask for --precision int8 without --block-size in form sorted or dense, or for --rest-precision int8",
        )
    seen = _observed(model, sorted({product.origin for product in products}), directory, how, runner)
    ranges = {
        product.origin: _checked(seen[product.origin], model.graph.node[product.place], how) for product in products
    }
    batches = [next(how.data.batches(how.batch_size))]
    expected = runner.run(directory / MODEL, batches)[0]
    for file in (MODEL, OBSERVED):
        changed = onnx.load(directory / file, load_external_data=False)
        _insert_pairs(changed.graph, _products(changed), ranges)
        onnx.save(changed, directory / file)
    got = runner.run(directory / MODEL, batches)[0]
    error = max(error_between(expected[name], got[name])[1] for name in expected)
    return Rounded(ranges, error, min(how.batch_size, len(how.data)))


def _products(model: onnx.ModelProto) -> list[_Product]:
    """Those that read floats, in graph order."""
    producers = {output: node for node in model.graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = []
    for place, node in enumerate(model.graph.node):
        if node.op_type not in PRODUCTS or node.domain:
            continue
        dtype = _type_of_int8(node.input[1], producers, types)
        before = producers.get(node.input[0])
        if dtype is not None and (before is None or before.op_type != "DequantizeLinear"):
            found.append(_Product(place, node.input[0], _origin(node.input[0], producers), dtype))
    return found


def _type_of_int8(name: str, producers: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> int | None:
    """The type in which an int8 weight is multiplied by; None for other weights."""
    cast, node = None, producers.get(name)
    while node is not None and (node.op_type == "Cast" or node.op_type in MOVES):
        if node.op_type == "Cast" and cast is None:
            cast = next(entry.i for entry in node.attribute if entry.name == "to")
        node = producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear" or types.get(node.input[0]) != TensorProto.INT8:
        return None
    if any(entry.name == "block_size" and entry.i for entry in node.attribute):
        return None
    return types.get(node.input[1]) if cast is None else cast


def _origin(name: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    """The value that ``name`` was moved from."""
    while name in producers and producers[name].op_type in MOVES:
        name = producers[name].input[0]
    return name


def _observed(
    model: onnx.ModelProto, names: Sequence[str], directory: Path, how: Activations, runner: Runner
) -> dict[str, Range]:
    """How large the values ``names`` are on the data."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    flat = numpy_helper.from_array(np.array([-1]), "ranges/flat")
    shown.graph.initializer.append(flat)
    outputs = {f"ranges/{index}": name for index, name in enumerate(names)}
    for output, name in outputs.items():
        cast = helper.make_node("Cast", [name], [f"{output}/float"], to=TensorProto.FLOAT)
        shown.graph.node.extend([cast, helper.make_node("Reshape", [f"{output}/float", flat.name], [output])])
        shown.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [None]))
    seen = {name: Range() for name in names}
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".ranges.", suffix=".onnx") as file:
        onnx.save(shown, file.name)
        with runner.open(Path(file.name)) as opened:
            for feeds in how.data.batches(how.batch_size):
                for output, values in opened.run(feeds, list(outputs)).items():
                    seen[outputs[output]].add(values)
    return seen


def _checked(seen: Range, node: onnx.NodeProto, how: Activations) -> float:
    """The largest magnitude in range."""
    place = f"{node.op_type} {node.name or node.output[0]!r}"
    largest = seen.largest(how.percentile)
    if not seen.count:
        raise UserError(
            f"no token of {how.name} reaches {place}, so nobody knows the range of what it reads",
            hint="give data that use every expert, drop those that no token uses, or choose --form dense",
        )
    if not np.isfinite(largest):
        raise UserError(f"{place} reads numbers that are not finite on {how.name}", hint=_OFF)
    if seen.largest(100) < SMALLEST:
        raise UserError(f"{place} reads zeros only on {how.name}, which have no range", hint=_OFF)
    if largest < SMALLEST:
        raise UserError(
            f"{how.percentile:g} percent of what {place} reads on {how.name} are zeros, so the rest would become zeros "
            "too",
            hint="give a higher --percentile",
        )
    return largest


def _insert_pairs(graph: onnx.GraphProto, products: Sequence[_Product], ranges: Mapping[str, float]) -> None:
    """Round what each product reads, once for all that read the same."""
    by_place = {product.place: product for product in products}
    done: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for place, node in enumerate(graph.node):
        product = by_place.get(place)
        if product is not None:
            reads = product.reads
            if reads not in done:
                done.add(reads)
                nodes += _pair(graph, product, ranges[product.origin])
            node.input[0] = f"{reads}/int8_float"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _pair(graph: onnx.GraphProto, product: _Product, largest: float) -> list[onnx.NodeProto]:
    name = product.reads
    scale = np.asarray(largest / LEVELS, helper.tensor_dtype_to_np_dtype(product.dtype))
    scales = [f"{name}/int8_scale", f"{name}/int8_zero_point"]
    for label, value in zip(scales, (scale, np.zeros((), np.int8)), strict=True):
        graph.initializer.append(numpy_helper.from_array(value, label))
    return [
        helper.make_node("QuantizeLinear", [name, *scales], [f"{name}/int8"], f"{name}/int8"),
        helper.make_node("DequantizeLinear", [f"{name}/int8", *scales], [f"{name}/int8_float"], f"{name}/int8_float"),
    ]
