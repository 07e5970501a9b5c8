"""The table of formats: a row each, of a model of text and of one of images."""

import math

import numpy as np
import torch

from benchmarks import precision
from benchmarks.precision import WAYS, Subject, interval, measure, report
from graph_passes.quantization.activations import Activations
from moe_spec.dataset import Dataset
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan

KEPT = (0, 2, 3)


def test_every_format_has_a_row_with_a_verdict_and_an_interval(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "WAYS", [WAYS[0], WAYS[2]])
    layers = tuple(LayerPlan(f"model.layers.{index}.mlp", 8, 2, KEPT) for index in range(2))
    ids = np.random.default_rng(0).integers(1, 50, (6, 12))
    data = Dataset({"input_ids": ids, "attention_mask": np.ones_like(ids)}, None, "")
    plans = {"three": PruningPlan("0" * 64, "by hand", layers)}
    subject = Subject("text", zoo.exported("mixtral"), plans, Activations(data, "data"), data)
    rows = measure(subject, tmp_path)
    assert [(row.kept, row.experts) for row in rows] == [
        (kept, name) for kept in plans for name in ("fp32", "bf16*", "int8")
    ]
    assert all(row.report.passed for row in rows if row.experts == "fp32")
    assert [row.bytes < rows[0].bytes for row in rows] == [False, True, True]
    table = [line for line in report(rows, "python -m benchmarks.precision").splitlines() if line.startswith("| text")]
    verdicts = ["PASS" if row.report.passed else "FAIL" for row in rows]
    assert [line.rsplit("| ", 1)[1] for line in table] == [f"{verdict} |" for verdict in verdicts]
    perplexity, rest = rows[0].quality.split(" ", 1)
    assert float(perplexity) > 1
    assert rest == "(+0.0% to +0.0%)"


def test_losses_are_those_of_torch():
    logits, ids = (
        np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32),
        np.array([[1, 2, 3, 4, 5]] * 2),
    )
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten()
    )
    assert math.isclose(precision._losses(logits, ids).mean(), wanted.item(), rel_tol=1e-6)


def test_an_interval_is_two_standard_errors_to_either_side():
    low, high = interval(np.array([1.0, 3.0]))
    assert math.isclose(low, 2 - 1.96)
    assert math.isclose(high, 2 + 1.96)
