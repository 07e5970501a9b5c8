"""Super experts: a few whose outputs are so large that a model falls apart without them, however seldom they speak."""

from collections.abc import Sequence

import numpy as np

from moe_spec.statistics import LayerStatistics

PERCENTILE = 99.5
SHARE_OF_LARGEST = 0.1
SHARE_OF_LAYERS = 0.75
"""The last layers of a model have large outputs anyway."""


def super_experts(layers: Sequence[LayerStatistics]) -> list[frozenset[int]]:
    """For each layer the ids of its super experts.

    An expert is one if its largest output element is above the 99.5th percentile over all experts of all layers and
    above a tenth of the largest of all, and it is in the first 75 % of the layers, rounded down. As in REAP,
    https://arxiv.org/abs/2510.13999, whose code compares signed elements; here they are absolute values.

    Raises:
        UserError: the statistics lack ``output_peak``.
    """
    peaks = [layer["output_peak"] for layer in layers]
    everyone = np.concatenate(peaks)
    threshold = max(np.percentile(everyone, PERCENTILE), SHARE_OF_LARGEST * everyone.max())
    early = int(SHARE_OF_LAYERS * len(layers))
    return [
        frozenset(np.flatnonzero(peak_E > threshold).tolist() if i < early else ()) for i, peak_E in enumerate(peaks)
    ]
