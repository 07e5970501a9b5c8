"""The table of families is what a new run finds; all of it takes too long here."""

import re
from pathlib import Path

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from benchmarks.families import UNKNOWN, WORK, Case, UnprovenError, outputs_of, prove, reason, report
from models import support
from models.checkpoints import load_model, save_model
from models.families import FAMILIES
from models.support import STAGES
from moe_spec.errors import UserError, VerificationError
from tests.families.configs import tiny

COMMITTED = {row.model_type: row for row in support.families()}


@pytest.mark.parametrize("name", ["ernie4_5_moe", "vmoe"])
def test_the_table_says_what_a_new_run_finds(name):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'moe-edge[tensorrt-rtx]'")
    assert prove(name) == COMMITTED[name]


def test_every_family_has_its_row_and_so_has_what_is_none():
    assert set(COMMITTED) == {*FAMILIES, *UNKNOWN}
    assert not {*FAMILIES} & {*UNKNOWN}
    assert set(UNKNOWN) <= set(CONFIG_MAPPING)
    for name, row in COMMITTED.items():
        assert set(row.why_not) <= set(WORK)
        assert bool(row.model) == (name in FAMILIES) == (row.reason("read") is None)
    assert set(WORK) == set(STAGES)


def test_the_document_is_the_table():
    document = Path("benchmarks/families.md").read_text()
    assert document == report(support.families(), support.tools()) + "\n"


def test_a_result_that_differs_proves_nothing(tmp_path):
    case = Case("olmoe", tmp_path, tmp_path)
    save_model(tiny("olmoe"), case.checkpoint)
    unpruned = outputs_of(load_model(case.checkpoint), case.feeds())
    with pytest.raises(UnprovenError, match=r"^logits differs by .* from what the pruned model should give$"):
        case.require_pruned(unpruned)
    with pytest.raises(UnprovenError):
        case.require_pruned({"logits": np.full_like(unpruned["logits"], np.nan)})


NOT_RECOGNISED = """/tmp/x/exported/model.onnx: 1 MoE layer(s) not recognised
layer a.mlp (TopK 'b'):
  experts: the weights are no values of the TopK (at Mul 'c')
  moe: no com.microsoft.MoE node follows the router (at TopK 'b')"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("/tmp/x/exported/model.onnx is broken", hint="h"), "exported/model.onnx is broken"),
        (
            UserError(NOT_RECOGNISED, hint="h"),
            "router not recognised: the weights are no values of the TopK (at Mul 'c')",
        ),
        (VerificationError("output differs"), "output differs"),
        (RuntimeError("no\nmore"), "RuntimeError: no"),
        (KeyError(), "KeyError: "),
    ],
)
def test_a_reason_is_one_line(error, words):
    assert reason(error, Case("olmoe", Path("/tmp/x"), Path("/tmp/y"))) == words


def test_what_needs_another_stage_is_not_tried(monkeypatch):
    def broken(case):
        raise UnprovenError("nothing to see")

    monkeypatch.setitem(WORK, "read", (broken, None))
    row = prove("olmoe")
    assert set(row.why_not) == set(WORK)
    assert (row.why_not["read"], row.why_not["pruned"]) == ("nothing to see", "not read")
    assert (row.model, row.reason("TensorRT-RTX")) == ("OlmoeForCausalLM", "nothing to see")
    assert re.search(r"\| olmoe \| OlmoeForCausalLM \|( \[1\] \|){7}", report([row], {}))
