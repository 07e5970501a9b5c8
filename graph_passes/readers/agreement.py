"""Router and experts are of one size: an exporter that lost experts is found here.

More experts than the router has rows are the other way round: no id reaches the last ones. They get rows whose logit is
-inf, so that they are proven to be unreachable, and deleted, like any other.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.record.block import FormError, MoEBlock, Router
from graph_passes.weights.weight import Array, Weight, from_array


def agree(block: MoEBlock, node: gs.Node) -> MoEBlock:
    """``block``, with a row of the router for every expert.

    Raises:
        FormError: the router has rows that lead to no expert, or another width, or a K that cannot be.
    """
    rows, experts = block.router.weight_EH.shape, block.experts.up_EHF.shape
    leads_to = block.router.leads_to
    if leads_to is not None and (block.router.columns, rows[1]) == experts[:2]:
        if not all(0 <= row < rows[0] for row in (*leads_to, *(row for row, _ in block.router.aliases))):
            raise FormError(f"the router has {rows[0]} rows, its gates are taken from {list(leads_to)}", node)
    elif rows[1] == experts[1] and rows[0] < experts[0] and block.router.groups is None:
        block = dataclasses.replace(block, router=_with_rows(block.router, experts[0] - rows[0]))
    elif rows != experts[:2]:
        raise FormError(
            f"the router chooses among {rows[0]} experts that read {rows[1]} channels, "
            f"there are {experts[0]} that read {experts[1]}",
            node,
        )
    if not 1 <= block.router.top_k <= rows[0]:
        raise FormError(f"the router selects K={block.router.top_k} of {rows[0]} experts", node)
    return block


def _with_rows(router: Router, added: int) -> Router:
    """``router`` with ``added`` rows that nothing chooses."""
    rows, width = router.weight_EH.shape
    out_of_reach = np.full(added, -np.inf, np.float32)

    def lengthened(vector: Weight | None, by: Array = out_of_reach) -> Weight:
        found = np.zeros(rows, np.float32) if vector is None else vector.load().astype(np.float32)
        return from_array(np.concatenate([found, by]))

    def padded(array: Array) -> Array:
        return np.concatenate([array, np.zeros((added, width), array.dtype)])

    bias, scales = router.selection_bias_E, router.scale_E
    return dataclasses.replace(
        router,
        weight_EH=router.weight_EH.map((rows + added, width), padded).cached(),
        bias_E=lengthened(router.bias_E),
        selection_bias_E=None if bias is None else lengthened(bias),
        scale_E=None if scales is None else lengthened(scales, np.zeros(added, np.float32)),
        unranked=added,
    )
