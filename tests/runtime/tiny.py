"""A two-layer MoE classifier in ONNX, written as the exporter and the graph passes write model directories."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

from moe_spec.files import sha256_text
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import BlockEntry, Manifest, TensorSpec, list_files
from moe_spec.plan import PruningPlan

EXPERTS, TOP_K, HIDDEN, WIDTH, CLASSES = 4, 2, 8, 16, 3
LAYERS = ("blocks.0.moe", "blocks.1.moe")
SOURCE = sha256_text("tiny")

_EXCLUDED = """
   excluded = IsInf(mask)
"""
_LAYER = """
   logits_{i} = MatMul(h_{i}, router_{i})
   masked_{i} = Add(logits_{i}, mask)
   probabilities_{i} = Softmax<axis = 1>(masked_{i})
   scores_{i} = Where(excluded, mask, probabilities_{i})
   ranked_{i}, ids_{i} = TopK<axis = 1>(scores_{i}, top_k)
   top_{i} = GatherElements<axis = 1>(probabilities_{i}, ids_{i})
   total_{i} = ReduceSum<keepdims = 1>(top_{i}, axis_1)
   share_{i} = Div(top_{i}, total_{i})
   zero_{i} = Sub(probabilities_{i}, probabilities_{i})
   gates_{i} = ScatterElements<axis = 1>(zero_{i}, ids_{i}, share_{i})
   stacked_{i} = Unsqueeze(h_{i}, axis_0)
   up_{i} = MatMul(stacked_{i}, w_up_{i})
   active_{i} = Relu(up_{i})
   experts_{i} = MatMul(active_{i}, w_down_{i})
   by_expert_{i} = Transpose<perm = [1, 0]>(gates_{i})
   column_{i} = Unsqueeze(by_expert_{i}, axis_2)
   weighted_{i} = Mul(experts_{i}, column_{i})
   moe_{i} = ReduceSum<keepdims = 0>(weighted_{i}, axis_0)
   h_{j} = Add(h_{i}, moe_{i})
"""
_DENSE_LAYER = """
   up_{i} = MatMul(h_{i}, w_up_{i})
   active_{i} = Relu(up_{i})
   moe_{i} = MatMul(active_{i}, w_down_{i})
   h_{j} = Add(h_{i}, moe_{i})
"""
_MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
tiny ({dtype}[batch, sequence, {hidden}] x) => ({dtype}[batch, {classes}] logits{observed})
{{
   shape = Shape(x)
   h_0 = Reshape(x, rows)
   {layers}
   back = Reshape(h_2, shape)
   pooled = ReduceMean<keepdims = 0>(back, axis_1)
   logits = MatMul(pooled, head)
}}
"""


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Which variant to write; the weights depend on ``seed`` alone.

    ``keep`` lists the experts in the graph, ``masked`` those of them that no token can select. With one expert kept no
    router is left. ``rolled`` names a layer whose router has its columns in the wrong order: a real fault. With
    ``twins`` experts 0 and 1 score almost the same. ``head`` multiplies the weights behind the last layer, which give
    ``classes`` logits.
    """

    keep: tuple[int, ...] = tuple(range(EXPERTS))
    masked: tuple[int, ...] = ()
    rolled: int | None = None
    dtype: str = "float"
    twins: bool = False
    head: float = 1.0
    classes: int = CLASSES
    seed: int = 0

    @property
    def routed(self) -> bool:
        return len(self.keep) > 1


def write(directory: Path, tiny: Tiny = Tiny(), plan: PruningPlan | None = None) -> Path:
    """A model directory: model.onnx, observed.onnx, model.onnx.data, manifest.json, config.json."""
    directory.mkdir(parents=True)
    _write_weights(directory / "model.onnx.data", tiny)
    for name, observed in (("model.onnx", False), ("observed.onnx", True)):
        onnx.save(_graph(tiny, observed), directory / name)
    labels = {str(index): name for index, name in enumerate(("boot", "coat", "shirt"))}
    (directory / "config.json").write_text(json.dumps({"model_type": "tiny", "id2label": labels}))
    manifest = Manifest(
        kind="optimized",
        source_sha256=SOURCE,
        parent_sha256=SOURCE,
        files=list_files(directory),
        inputs=(TensorSpec("x", _numpy(tiny), ("batch", "sequence", HIDDEN)),),
        outputs=(TensorSpec("logits", _numpy(tiny), ("batch", tiny.classes)),),
        blocks=tuple(_block(tiny, index) for index in range(len(LAYERS))),
        plan=plan,
    )
    manifest.save(directory)
    return directory


def plan(keep: Sequence[int], top_k: int = TOP_K) -> PruningPlan:
    """Keep the same experts in both layers."""
    layers = tuple(LayerPlan(name, EXPERTS, min(top_k, len(keep)), tuple(keep)) for name in LAYERS)
    return PruningPlan(SOURCE, "random", layers)


def examples(count: int, sequence: int = 5, seed: int = 1) -> np.ndarray:
    """(N, S, H) float32 model inputs."""
    return np.random.default_rng(seed).standard_normal((count, sequence, HIDDEN)).astype(np.float32)


def _block(tiny: Tiny, index: int) -> BlockEntry:
    observed = (f"gates_{index}", f"scores_{index}") if tiny.routed else (None, None)
    return BlockEntry(
        name=LAYERS[index],
        experts=len(tiny.keep),
        top_k=min(TOP_K, len(tiny.keep)),
        keep=tiny.keep,
        router="softmax, top-k, renormalised" if tiny.routed else "",
        form="dense" if tiny.routed else "ffn",
        bytes=0,
        gates=observed[0],
        scores=observed[1],
    )


def _numpy(tiny: Tiny) -> str:
    return {"float": "float32", "float16": "float16"}[tiny.dtype]


def _graph(tiny: Tiny, observed: bool) -> onnx.ModelProto:
    layer = _LAYER if tiny.routed else _DENSE_LAYER
    layers = "".join(layer.format(i=index, j=index + 1) for index in range(len(LAYERS)))
    layers = _EXCLUDED + layers if tiny.routed else layers
    width = len(tiny.keep)
    extra = "".join(
        f", {tiny.dtype}[tokens, {width}] {kind}_{index}"
        for index in range(len(LAYERS))
        for kind in ("gates", "scores")
        if observed and tiny.routed
    )
    text = _MODEL.format(dtype=tiny.dtype, hidden=HIDDEN, classes=tiny.classes, observed=extra, layers=layers)
    model = onnx.parser.parse_model(text)
    offset = 0
    for name, array in _constants(tiny).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for name, array in _weights(tiny).items():
        model.graph.initializer.append(_external(name, array, offset))
        offset += array.nbytes
    return model


def _constants(tiny: Tiny) -> dict[str, np.ndarray]:
    mask = np.array([-np.inf if expert in tiny.masked else 0.0 for expert in tiny.keep], _numpy(tiny))
    shared = {"rows": np.array([-1, HIDDEN])}
    shared |= {f"axis_{axis}": np.array([axis]) for axis in range(3)}
    return shared | ({"mask": mask, "top_k": np.array([TOP_K])} if tiny.routed else {})


def _weights(tiny: Tiny) -> dict[str, np.ndarray]:
    random = np.random.default_rng(tiny.seed)
    weights: dict[str, np.ndarray] = {}
    for index in range(len(LAYERS)):
        router = random.standard_normal((HIDDEN, EXPERTS))
        if tiny.twins:
            router[:, 1] = router[:, 0] + 1e-3 * router[:, 1]
        router = router[:, tiny.keep]
        up = random.standard_normal((EXPERTS, HIDDEN, WIDTH))[list(tiny.keep)] / np.sqrt(HIDDEN)
        down = random.standard_normal((EXPERTS, WIDTH, HIDDEN))[list(tiny.keep)] / np.sqrt(WIDTH)
        if tiny.routed:
            weights[f"router_{index}"] = np.roll(router, 1, axis=1) if tiny.rolled == index else router
        weights[f"w_up_{index}"] = up if tiny.routed else up[0]
        weights[f"w_down_{index}"] = down if tiny.routed else down[0]
    weights["head"] = random.standard_normal((HIDDEN, tiny.classes)) * tiny.head
    return {name: np.ascontiguousarray(array, _numpy(tiny)) for name, array in weights.items()}


def _write_weights(path: Path, tiny: Tiny) -> None:
    path.write_bytes(b"".join(array.tobytes() for array in _weights(tiny).values()))


def _external(name: str, array: np.ndarray, offset: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=array.shape)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
