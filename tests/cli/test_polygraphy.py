"""Another judge: where a model is dense, Polygraphy's own command line says of it what `verify` says.

Where experts are chosen it cannot: a flip at a margin of rounding is an error like any other to it.
"""

import subprocess
import sysconfig
from pathlib import Path

import pytest

from benchmarks.planted import FAULTS, plant
from graph_passes.proof.mask import mask_model
from moe_spec.plan import PruningPlan
from tests.cli.helpers import done, invoke

pytest.importorskip("polygraphy")


@pytest.fixture(scope="module")
def work(zoo, tmp_path_factory):
    """A plan for one expert a layer, the model in which no other can be chosen, what Polygraphy fed it and got."""
    root = tmp_path_factory.mktemp("polygraphy")
    done("plan", zoo.exported("vmoe"), "--experts", "2", "--clamp-top-k", "-o", root / "plan.json")
    mask_model(zoo.exported("vmoe"), PruningPlan.load(root / "plan.json", clamp_top_k=True), root / "reference")
    shapes = ("--input-shapes", "pixel_values:[3,3,12,12]")
    made = compare(root / "reference", *shapes, "--save-inputs", "inputs.json", "--save-outputs", "outputs.json")
    assert made == 0
    return root


def compare(model: Path, *options: str) -> int:
    """Polygraphy's exit code for a model directory, run by ONNX Runtime."""
    program = Path(sysconfig.get_path("scripts")) / "polygraphy"
    command = [str(program), "run", "model.onnx", "--onnxrt", "--providers", "cpu", *options]
    return subprocess.run(command, cwd=model, capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    ("fault", "verdict", "exits"), [(None, "PASS", (0, 0)), ("two experts swapped", "FAIL", (3, 1))]
)
def test_polygraphy_agrees_about_a_dense_model(zoo, work, tmp_path, fault, verdict, exits):
    source, candidate = zoo.exported("vmoe"), tmp_path / "candidate"
    if fault is not None:
        source = plant(source, tmp_path / "broken", FAULTS[fault], 1)
    done("optimize", source, "--plan", work / "plan.json", "--any-model", "--target", "rtx-ada", "-o", candidate)
    code, out, _ = invoke("verify", candidate, "--reference", work / "reference")
    known = [f"--load-{what}={work}/reference/{what}.json" for what in ("inputs", "outputs")]
    assert (out[:4], code, compare(candidate, *known)) == (verdict, *exits)
