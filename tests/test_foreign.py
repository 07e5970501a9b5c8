"""The foreign graphs are what their table says, and compute what torch computes."""

from collections import Counter

import numpy as np
import onnx
import pytest

from tests.foreign.inputs import UNTRACED
from tests.foreign.table import FOREIGN
from tests.zoo import RUNNER

TOLERANCE = 1e-5

RUNNABLE = [name for name, entry in FOREIGN.items() if entry.runs]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_graph_is_valid(zoo, name):
    onnx.checker.check_model(zoo.foreign(name), full_check=True)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_foreign_graph_computes_what_its_torch_model_does_at_sizes_that_were_not_traced(zoo, name):
    entry = FOREIGN[name]
    examples = [entry.inputs.random(size, seed) for seed, size in enumerate(UNTRACED, 1)]
    feeds = [{key: value.numpy() for key, value in example.items()} for example in examples]
    for example, outputs in zip(examples, RUNNER.run(zoo.foreign(name), feeds), strict=True):
        expected = entry.reference(example).numpy()
        np.testing.assert_allclose(
            next(iter(outputs.values())), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max()
        )


MARKS = {
    "grouped": {"Split", "Range", "GatherND", "ScatterElements", "CumSum"},
    "nonzero": {"NonZero"},
    "sorted": {"Split", "ScatterND"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_graph_has_the_form_of_the_table(zoo, name):
    graph = onnx.load(zoo.foreign(name), load_external_data=False).graph
    ops = Counter(node.op_type for node in graph.node)
    assert set(ops) >= MARKS.get(FOREIGN[name].form, set())
