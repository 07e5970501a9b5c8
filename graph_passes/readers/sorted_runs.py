"""Reader for sorted tokens that one Split or Slice hands to the experts, as our writer `sorted_runs` emits it.

::

    y = Concat(ffn_e(Split(rows, counts)[e]))          JetMoE: projection by projection

What stands around this is in `runs`.
"""

import onnx_graphsurgeon as gs

from graph_passes.readers.parts import runs
from graph_passes.record.block import MoEBlock
from graph_passes.routers import Weights

FORM = "sorted"
LOOKS_FOR = "Concat of experts that split sorted rows by their counts"

TAKERS = ("Slice", "Split")


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that put the experts' outputs behind one another."""
    return runs.anchors(graph, TAKERS)


def read(concat: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose experts' outputs ``concat`` puts behind one another.

    Raises:
        FormError: with the first op that stands elsewhere than in this form, or the experts that are missing.
    """
    return runs.read(concat, FORM, name, weights)
