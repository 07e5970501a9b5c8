"""Graphs of real exporters: read whole, pruned exactly, left alone where nothing goes; or refused for a reason."""

import numpy as np
import pytest

from graph_passes.describe import inspect_model, read_model
from graph_passes.optimize import optimize
from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from tests.foreign.table import FOREIGN
from tests.zoo import RUNNER

REFUSED = {
    "batched_mm_gpt_oss_unoptimized": "batched_mm: ",
    "lost_mixtral": "the exporter kept as many as its example hit",
    "lost_unique": "the exporter lost experts [2, 3, 4, 5, 6]",
    "masked_loop_images": "masked_loop: ",
    "masked_loop_switch_torchscript": "masked_loop: ",
    "sorted_jetmoe": "GatherND ends no known activation",
}
"""Not taken as a whole, and what is said. JetMoE's experts are; its mixture of attention heads is none of FFNs."""

SHOWS_ITS_CHOICE = ("grouped_gpt_oss",)
READ = [name for name in FOREIGN if name not in REFUSED]
RUN = [name for name in READ if FOREIGN[name].runs and name not in SHOWS_ITS_CHOICE]
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


@pytest.mark.parametrize("name", READ)
def test_every_layer_is_read_in_the_form_of_its_exporter(zoo, name):
    entry, blocks = FOREIGN[name], read_model(zoo.foreign(name)).blocks
    assert [block.form for block in blocks] == [entry.form] * entry.layers
    assert {(block.num_experts, block.router.top_k) for block in blocks} == {(8, entry.top_k)}


@pytest.mark.parametrize("keep", [(1, 4, 5), (6,)], ids=["3 of 8", "1 of 8"])
@pytest.mark.parametrize("name", RUN)
def test_it_is_pruned_and_proven(zoo, name, keep, tmp_path):
    model = read_model(zoo.foreign(name))
    try:
        layers = tuple(
            LayerPlan(block.name, 8, min(block.router.top_k, len(keep)), keep, groups=block.router.groups)
            for block in model.blocks
        )
    except UserError as error:
        pytest.skip(f"its groups cannot choose among them: {error.what}")
    plan = PruningPlan(model.source_sha256, "by hand", layers)
    manifest = optimize(zoo.foreign(name), tmp_path / "out", RUNNER, plan=plan)
    assert {entry.experts for entry in manifest.blocks} == {len(keep)}
    worst = max(entry["max_rel"] for entry in manifest.details["oracle"])
    assert worst <= TOLERANCE[np.dtype(manifest.outputs[0].dtype).name]
    assert not optimize(tmp_path / "out", tmp_path / "again", RUNNER).modified


@pytest.mark.parametrize("name", RUN)
def test_nothing_changes_where_nothing_goes(zoo, name, tmp_path):
    manifest = optimize(zoo.foreign(name), tmp_path / "out", RUNNER)
    assert not manifest.modified
    assert (tmp_path / "out" / MODEL).read_bytes() == zoo.foreign(name).read_bytes()


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_takes_is_refused_for_its_reason(zoo, name):
    refusals = [str(refusal) for layer in inspect_model(zoo.foreign(name)).unrecognised for refusal in layer.refusals]
    assert any(REFUSED[name] in refusal for refusal in refusals), refusals
