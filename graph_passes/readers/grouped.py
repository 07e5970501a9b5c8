"""Reader for transformers' default experts as its own exporter unrolls them: a Range of rows and a MatMul an expert.

::

    ends = CumSum(histogram of sorted ids)
    y = Concat(MatMul(Gather(rows, Range(ends[e - 1], ends[e])), W[e]))      for each projection

The stacked weights (E, in, out) are taken apart by one Split. What stands around this is in `runs`.
"""

import onnx_graphsurgeon as gs

from graph_passes.readers.parts import runs
from graph_passes.record.block import MoEBlock
from graph_passes.routers import Weights

FORM = "grouped"
LOOKS_FOR = "Concat of experts that gather a Range of sorted rows"

TAKERS = ("Gather", "GatherND")


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that put the experts' outputs behind one another."""
    return runs.anchors(graph, TAKERS)


def read(concat: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose experts' outputs ``concat`` puts behind one another.

    Raises:
        FormError: with the first op that stands elsewhere than in this form, or the experts that are missing.
    """
    return runs.read(concat, FORM, name, weights)
