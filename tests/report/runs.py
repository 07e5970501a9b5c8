"""Directories of artifacts: one of a real run with tiny models, and one that an attacker wrote."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_spec.dataset import Dataset
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from moe_spec.statistics import LayerStatistics, Statistics
from runtime.backend import BuildOptions
from runtime.bench import row_of
from runtime.bench_report import BenchReport
from runtime.build import build
from runtime.measuring.memory import Alone
from runtime.model_dir import model_bytes
from runtime.run import run
from runtime.targets import find_target
from runtime.verification.report import LayerParity, OutputParity, ParityReport
from runtime.verification.tolerances import TOLERANCES
from runtime.verify import verify
from tests.runtime import tiny
from tests.runtime.tiny import EXPERTS, LAYERS, SOURCE, TOP_K, Tiny

KEEPS = {"whole": (0, 1, 2, 3), "three": (0, 2, 3), "one": (2,)}
SCORES = (0.25, 0.0625, 12.5, 1234.5)
TOKENS = (100.0, 50.0, 250.0, 600.0)
EVIL = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'


def plan(keep: Sequence[int], name: str = "") -> PruningPlan:
    """By gate mass, with `SCORES` in every layer."""
    layers = [LayerPlan(name or layer, EXPERTS, min(TOP_K, len(keep)), tuple(keep), SCORES) for layer in LAYERS]
    return PruningPlan(SOURCE, "gate-mass", tuple(layers[:1] if name else layers), {"keep": len(keep), "floor": 1})


def statistics(*names: str) -> Statistics:
    sums = {"tokens": np.array(TOKENS)}
    layers = tuple(LayerStatistics(name, EXPERTS, TOP_K, 500, sums) for name in names)
    return Statistics(SOURCE, ("data",), layers)


def task(directory: Path, count: int = 40) -> Dataset:
    """Labelled as the whole model answers, but every fifth."""
    examples = tiny.examples(count)
    np.savez(directory.parent / f"{directory.name}.npz", x=examples)
    logits = run(directory / "whole" / "optimized", [directory.parent / f"{directory.name}.npz"]).outputs["logits"]
    labels = logits.argmax(-1)
    labels[::5] = (labels[::5] + 1) % logits.shape[1]
    return Dataset({"x": examples}, labels, "data-hash")


def write_run(directory: Path) -> Path:
    """Three variants, one engine, statistics, parity reports and times."""
    statistics(*LAYERS).save(directory / "statistics.safetensors")
    for name, keep in KEEPS.items():
        made = plan(keep)
        made.save(directory / name / "plan.json")
        tiny.write(directory / name / "optimized", Tiny(keep=keep), made)
        dropped = tuple(expert for expert in range(EXPERTS) if expert not in keep)
        tiny.write(directory / name / "reference", Tiny(masked=dropped), made)
        _relabel(directory / name / "reference", "reference")
    data = task(directory)
    for name in KEEPS:
        folder = directory / name
        verify(folder / "optimized", folder / "reference", data, threads=1).save(folder / "parity.json")
    build(directory / "one" / "optimized", find_target("cpu"), BuildOptions(), directory / "one" / "engine")
    _bench(directory).save(directory / "bench.json")
    return directory


def _relabel(directory: Path, kind: str) -> None:
    dataclasses.replace(Manifest.load(directory), kind=kind).save(directory)


def _bench(directory: Path) -> BenchReport:
    """Of known times, so that the page can be compared with them."""
    models = {name: directory / name / "optimized" for name in KEEPS}
    rows = [
        row_of(str(model), 1, [len(KEEPS[name]) / 4 + 0.5], Alone(2.0, 10**6), model_bytes(model))
        for name, model in models.items()
    ]
    return BenchReport.of(rows)


def failing(directory: Path) -> Path:
    """A variant whose second router has its columns in the wrong order."""
    for name, model in (("optimized", Tiny(rolled=1)), ("reference", Tiny())):
        tiny.write(directory / name, model, plan(KEEPS["whole"]))
    report = verify(directory / "optimized", directory / "reference", threads=1)
    report.save(directory / "parity.json")
    return directory


def write_hostile(directory: Path) -> Path:
    """Markup in every name that a page could show, of layers, folders, criteria, tools, outputs and reasons."""
    folder = directory / "<img src=x onerror=alert(1)>"
    folder.mkdir(parents=True)
    made = dataclasses.replace(plan((0, 2), EVIL), criterion=EVIL)
    made.save(folder / "plan.json")
    statistics(EVIL).save(directory / "statistics.safetensors")
    manifest = Manifest(
        kind=EVIL,
        source_sha256=SOURCE,
        parent_sha256=SOURCE,
        files=(),
        inputs=(),
        outputs=(),
        blocks=(dataclasses.replace(_block(), name=EVIL),),
        plan=made,
        tools={EVIL: EVIL},
        details={"target": EVIL, "oracle": [{"max_rel": 1e-6}]},
    )
    manifest.save(folder)
    _hostile_report(folder).save(folder / "parity.json")
    (directory / "broken.json").write_text('{"artifact": "plan", "schema": "' + EVIL.replace('"', "'") + '"}')
    return directory


def _block():
    return tiny._block(Tiny(keep=(0, 2)), 0)


def _hostile_report(folder: Path) -> ParityReport:
    from moe_spec.files import sha256_file

    layer = LayerParity(EVIL, 9, 3, 1 / 3, 0.9, 9, 3, 1, 0.5, 0.1, (4, 0, 5, 0), (0, 0, 0, 0, 0, 9, 0, 0), (0,) * 8)
    return ParityReport(
        passed=False,
        reasons=(EVIL,),
        first_wrong_layer=EVIL,
        candidate_sha256=sha256_file(folder / "manifest.json"),
        reference_sha256=SOURCE,
        data=EVIL,
        data_sha256=None,
        examples=3,
        precision=EVIL,
        tolerance=TOLERANCES["float32"],
        forced=False,
        layers=(layer,),
        outputs=(OutputParity(EVIL, 3, 0.1, 0.1, None, 1.0, 0.0, 1.0, 1.0),),
        accuracy=None,
        notes=(EVIL,),
    )
