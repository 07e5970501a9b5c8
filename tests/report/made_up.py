"""Artifacts that nothing was computed for: what the report makes of hashes, sizes and numbers can be told from them."""

from typing import Any

from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import BlockEntry, FileEntry, Manifest
from moe_spec.plan import PruningPlan
from report.artifacts import Artifacts, Found
from report.variants import variants_of
from report.verdict import Verdict, judge
from runtime.verification.report import ParityReport, TaskAccuracy
from runtime.verification.tolerances import TOLERANCES

EXPERTS = 4
CHECKPOINT = "checkpoint"


def plan(kept: int = 2, of: str = CHECKPOINT, experts: int = EXPERTS) -> PruningPlan:
    return PruningPlan(of, "reap", (LayerPlan("moe", experts, 1, tuple(range(kept))),))


def model(
    path: str,
    parent: str = CHECKPOINT,
    *,
    source: str = CHECKPOINT,
    keep: int | None = None,
    experts: int = EXPERTS,
    size: int = 1000,
    kind: str = "optimized",
    model_sha256: str = "",
    **details: Any,
) -> Found[Manifest]:
    """A model whose hash is its path; with ``keep`` by a plan that keeps as many of ``experts``."""
    left = experts if keep is None else keep
    block = BlockEntry("moe", left, 1, tuple(range(left)), "softmax, top-k", "dense", 0)
    files = (FileEntry("model.onnx", "", size),)
    made = None if keep is None else plan(keep, source, experts)
    manifest = Manifest(kind, source, parent, files, (), (), (block,), model_sha256, made, details=details)
    return Found(path, path, manifest)


def parity(
    candidate: str,
    reference: str = "exported",
    accuracy: float | None = None,
    *,
    data: str = "test",
    passed: bool = True,
    path: str = "",
    **more: Any,
) -> Found[ParityReport]:
    """A report on the models of these hashes."""
    report = ParityReport(
        passed=passed,
        reasons=() if passed else ("layer moe: it is wrong",),
        first_wrong_layer=None,
        candidate_sha256=candidate,
        reference_sha256=reference,
        data="task data",
        data_sha256=data,
        examples=1000,
        precision="float32",
        tolerance=TOLERANCES["float32"],
        forced=False,
        layers=(),
        outputs=(),
        accuracy=None if accuracy is None else TaskAccuracy(accuracy, accuracy, 0.0, 1000, 0.0, 0.0),
        **more,
    )
    return Found(path or f"{candidate}.json", f"{candidate}, {data}", report)


def run(*found: Found[Any], **more: Any) -> Artifacts:
    """A run of models and parity reports, and ``more`` of other kinds."""
    models = tuple(one for one in found if isinstance(one.value, Manifest))
    parities = tuple(one for one in found if isinstance(one.value, ParityReport))
    return Artifacts("run", models=models, parities=parities, **more)


def verdict_of(artifacts: Artifacts, max_loss: float = 0.01) -> Verdict:
    return judge(artifacts, variants_of(artifacts), max_loss)
