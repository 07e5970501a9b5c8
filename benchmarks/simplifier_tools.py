"""The simplifiers that `benchmarks.simplifiers` compares, and how each is called."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import onnx

from benchmarks.masked import MASKED
from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from runtime.onnxruntime.backend import OnnxRuntimeRunner

RUNNER = OnnxRuntimeRunner(threads=1)


@dataclasses.dataclass(frozen=True)
class Tool:
    """Something that makes graphs smaller.

    Attributes:
        name: what its column is called.
        module: that it needs, which tells its version.
        call: what is called, for the reader.
        run: reads an ONNX file and writes another as ``MODEL`` in a new directory.
        told: whether a plan tells it what to keep.
    """

    name: str
    module: str
    call: str
    run: Callable[[Path, Path], None]
    told: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this project."""
        return self.module == "graph_passes"

    @property
    def version(self) -> str | None:
        """Of what is installed; None where nothing is."""
        if self.ours:
            return "this repository"
        if importlib.util.find_spec(self.module) is None:
            return None
        return str(importlib.import_module(self.module).__version__).removeprefix("v")


def _onnxslim(source: Path, out: Path) -> None:
    _save(importlib.import_module("onnxslim").slim(onnx.load(source)), out)


def _onnxsim(source: Path, out: Path) -> None:
    model, _ = importlib.import_module("onnxsim").simplify(onnx.load(source), include_subgraph=True)
    _save(model, out)


def _onnxoptimizer(source: Path, out: Path) -> None:
    module = importlib.import_module("onnxoptimizer")
    passes = module.get_fuse_and_elimination_passes()
    _save(module.optimize(onnx.load(source), passes, fixed_point=True), out)


def _onnxscript(source: Path, out: Path) -> None:
    _save(importlib.import_module("onnxscript.optimizer").optimize(onnx.load(source)), out)


def _onnxruntime(source: Path, out: Path) -> None:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(out / MODEL)
    options.log_severity_level = 3  # it would warn that the file is for this kind of processor only
    out.mkdir()
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _graphsurgeon(source: Path, out: Path) -> None:
    gs = importlib.import_module("onnx_graphsurgeon")
    _save(gs.export_onnx(gs.import_onnx(onnx.load(source)).fold_constants().cleanup().toposort()), out)


def _save(model: onnx.ModelProto, out: Path) -> None:
    out.mkdir()
    onnx.save(model, out / MODEL)


def _ours(source: Path, out: Path) -> None:
    optimize(source, out, RUNNER)


def _ours_told(source: Path, out: Path) -> None:
    model = read_model(source)
    (block,) = model.blocks
    layer = LayerPlan(block.name, block.num_experts, block.router.top_k, MASKED[source.stem].reachable)
    optimize(source, out, RUNNER, plan=PruningPlan(model.source_sha256, "by hand", (layer,)))


TOOLS = (
    Tool("onnxslim", "onnxslim", "slim", _onnxslim),
    Tool("onnxsim", "onnxsim", "simplify(include_subgraph=True)", _onnxsim),
    Tool("onnxoptimizer", "onnxoptimizer", "optimize, all fuse and eliminate passes, to a fixed point", _onnxoptimizer),
    Tool("onnxscript", "onnxscript", "optimizer.optimize", _onnxscript),
    Tool("onnxruntime", "onnxruntime", "offline, ORT_ENABLE_ALL", _onnxruntime),
    Tool("graphsurgeon", "onnx_graphsurgeon", "fold_constants, cleanup", _graphsurgeon),
    Tool("moe-edge", "graph_passes", "optimize", _ours),
    Tool("moe-edge with a plan", "graph_passes", "optimize, told which experts to keep", _ours_told, True),
)
"""Columns, in order."""
