import numpy as np
import pytest

from benchmarks import methods
from benchmarks.methods import METHODS, SHARES, UNPRUNED, cell, evaluate, measure_task, report
from benchmarks.tasks.metrics import PERPLEXITY
from benchmarks.tasks.task import Task
from models.checkpoints import save_model
from tests.models_table import TINY


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A tiny model, not trained; what is made for it lies in a cache of its own."""
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    save_model(TINY["mixtral"](), tmp_path / "checkpoint")
    for index, name in enumerate(("calibration", "test")):
        ids = np.random.default_rng(index).integers(0, 128, (8, 6))
        np.savez_compressed(tmp_path / f"{name}.npz", input_ids=ids)
    data = {name: tmp_path / f"{name}.npz" for name in ("calibration", "test")}
    return Task("tiny", tmp_path / "checkpoint", finetune=data["calibration"], metric=PERPLEXITY, **data)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes(method, task):
    values = [cell(task, method, share) for share in ("50 %", "all but one")]
    assert (values[1] is None) == (method == "naee")  # which keeps K experts at least
    assert all(value is None or np.isfinite(value) for value in values)


def test_a_cell_is_measured_once(task, monkeypatch):
    value = cell(task, "frequency", "50 %")
    assert value is not None
    monkeypatch.setattr(methods, "measure", lambda *_: pytest.fail("measured again"))
    assert cell(task, "frequency", "50 %") == value
    assert cell(task, UNPRUNED, "") == evaluate(task, None)


def test_the_table_has_a_row_a_method_and_a_column_a_share(task, monkeypatch):
    monkeypatch.setattr(methods, "TASKS", {"tiny": lambda _seed, _tell: task})
    text = report([measure_task("tiny", ["naee", "frequency"], seeds=2)], "command")
    head, _, unpruned, naee, _ = text.splitlines()[-5:]
    assert head == f"| experts dropped | {' | '.join(SHARES)} |"
    assert unpruned.startswith(f"| {UNPRUNED} | {evaluate(task, None):.1f} |")
    assert naee.endswith(" | - |")
    assert "Perplexity, lower is better; 1 trained model(s)." in text
