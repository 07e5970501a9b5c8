"""What the page says of artifacts that were made up."""

import html
import os
import re
from pathlib import Path

import pytest

from report import page
from report.artifacts import Found, collect
from report.variants import variants_of
from runtime.bench import BenchRow
from runtime.fit import Fit
from runtime.targets import TARGETS
from tests.report.made_up import model, parity, run, verdict_of

EXPORTED = model("exported", kind="exported", size=9000)
BASELINE = parity("exported", "checkpoint", 0.9)


def text_of(artifacts, directory=Path("nowhere"), max_loss=0.01):
    verdict = verdict_of(artifacts, max_loss)
    written = page.render(directory, artifacts, variants_of(artifacts), verdict)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", written)))


def pruned(count):
    """Models of which the first is the largest, and reports on them."""
    models = [model(f"p{index}", "exported", keep=2, size=8000 - 300 * index) for index in range(count)]
    return models, [parity(one.path, accuracy=0.9 - index / 50) for index, one in enumerate(models)]


def test_a_report_says_beside_what_a_model_was_judged():
    text = text_of(run(EXPORTED, BASELINE, parity("elsewhere", "f" * 64, passed=False, path="old.json")))
    assert "1,000 examples of task data, beside checkpoint, judged as float32" in text
    assert "✗ old.json, of a model that is not here or was changed since fails" in text
    assert "1,000 examples of task data, beside ffffffffffff, judged as float32" in text


def test_the_chosen_variant_and_the_smallest_are_drawn_and_what_is_not_is_counted():
    models, reports = pruned(20)
    text = text_of(run(EXPORTED, *models, BASELINE, *reports), max_loss=0.03)
    assert "p1 may ship" in text  # of 20 the second largest
    assert "smallest last. The shaded part is what may be lost" in text
    assert "intervals. 7 larger ones are left out: the table below has them." in text


def test_the_chosen_variant_is_in_the_table_of_targets(monkeypatch):
    fits = {row.name: Fit(row.name, (), 10, 0, 0, None, 30, None, shared=False) for row in TARGETS}
    monkeypatch.setattr(page, "_fits", lambda _: fits)
    models, reports = pruned(12)
    artifacts = run(EXPORTED, *models, BASELINE, *reports)
    text = text_of(artifacts, max_loss=0.19)
    assert "p9 may ship" in text
    assert "target memory exported p0 p1 p2 p3 p4 p5 p9" in text
    assert "Left out: 5 models." in text


def test_what_verify_timed_is_a_latency():
    rows = [BenchRow(name, 1, "", median, 0, 0, 0, None, 0, None, 0) for name, median in (("a", 8.0), ("b", 2.0))]
    models, _ = pruned(1)
    text = text_of(run(EXPORTED, *models, BASELINE, parity("p0", accuracy=0.9, cost=tuple(rows))))
    assert "Latency, batch 1 2.00 ms 25 % of the unpruned" in text
    assert "Not in this directory: latency." not in text


@pytest.mark.parametrize(("dtype", "says"), [("int4", "✗ not as it is"), ("", "↻ another form")])
def test_formats_that_a_target_lacks_are_no_matter_of_form(dtype, says, monkeypatch):
    monkeypatch.setattr(page, "unknown_formats", lambda *_: [dtype] if dtype else [])
    fit = Fit("cpu", ("it is not taken",), 10, 0, 0, None, 30, None, shared=False)
    assert page._fit_cell(fit, Path("model"), TARGETS[0])["says"] == says


def test_a_checkpoint_that_lies_in_the_run_has_to_be_brought_along():
    """No command makes it."""
    given = Found("folder", "checkpoint", "config.json")
    text = text_of(run(EXPORTED, checkpoints=(given,)))
    assert "to which what is in this table was brought" in text
    assert "What has to be brought along name SHA-256 folder checkpoint Copy moe-edge export folder -o exported" in text


def test_a_folder_that_cannot_be_looked_into_is_listed(tmp_path, monkeypatch):
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    (tmp_path / "run" / "locked").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", refusing)
    artifacts = collect(tmp_path / "run")
    assert artifacts.problems == (("locked", "Permission denied"),)
    assert "Could not be read locked Permission denied" in text_of(artifacts)
