"""Walking back over the ops with which a value is picked by index, to what it is picked from."""

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, produced_by, source

GATHERS = ("Gather", "GatherND", "GatherElements")
AROUND = SHAPE_ONLY | {"Expand", "Transpose"}
"""What stands behind a gather."""
BEFORE = frozenset({"Flatten", "Identity", "Transpose", "Unsqueeze"})
"""What stands before one. No Reshape: it makes (T, H) of (B, S, H), and tokens are counted from there."""


def gather_of(tensor: gs.Tensor) -> gs.Node | None:
    """The gather that gives ``tensor``, ops that only reshape it stepped over."""
    return produced_by(source(tensor, AROUND), *GATHERS)


def gathered_from(gather: gs.Node) -> gs.Tensor:
    """What ``gather`` picks from, as it was before it was reshaped to be picked from."""
    return source(gather.inputs[0], BEFORE)
