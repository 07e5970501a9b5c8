import numpy as np
import pytest

from benchmarks.graph_passes import QUICK_LARGE, Cost, NodesRow, Round, measure_bytes, measure_nodes, report
from benchmarks.large_models import UNROLLED, Sizes, save_large
from graph_passes.describe import read_model
from tests.zoo import RUNNER


@pytest.mark.parametrize("form", UNROLLED)
def test_large_models_are_of_the_form_that_they_claim_and_run(form, tmp_path):
    path = tmp_path / "model.onnx"
    save_large(form, Sizes(layers=2, experts=8, top_k=2, hidden=16, width=8), path)
    assert [block.form for block in read_model(path).blocks] == [form, form]
    hidden = np.random.default_rng(0).standard_normal((5, 16), dtype=np.float32)
    (result,) = RUNNER.run(path, [{"hidden": hidden}])
    assert np.isfinite(result["out"]).all()


def test_nodes_and_bytes_go_with_the_experts():
    row = measure_nodes("masked_loop", layers=1, experts=8)
    assert row.cost.nodes_after < row.cost.nodes_before
    (one,) = measure_bytes(QUICK_LARGE, rounds=1)
    assert one.cost.bytes_after == pytest.approx(one.cost.bytes_before / 2, rel=0.02)
    assert one.cost.peak_bytes > 0


def test_the_document_compares_time_per_node_with_the_smallest_graph_of_the_form():
    def cost(seconds: float, nodes: int) -> Cost:
        return Cost(seconds, 200 << 20, nodes, nodes // 2, 4_000_000_000, 2_000_000_000)

    rows = [NodesRow("nonzero", 12, cost(1.0, 1000)), NodesRow("nonzero", 24, cost(3.0, 2000))]
    rounds = [Round(cost(seconds, 10), cp_seconds=4.0) for seconds in (6.0, 4.0, 10.0)]
    text = report(rows, rounds, 128, "command")
    assert "| nonzero | 24 | 2,000 | 1,000 | 3.0 | 200 | 1.50 |" in text
    assert "nonzero with 24 layers, took 3.0 s: within 60 s" in text
    assert "| 4.0 GB | 2.0 GB | 6.0 s | 4.0 s | 1.50 | 200 MB |" in text
    assert "The median is 1.50 times as long as `cp`" in text
