"""Statistics of experts whose logits and outputs are known."""

import numpy as np

from moe_spec.statistics import LayerStatistics


def observed(logits_ET, outputs_ETH=None, tokens=None, saliency=None):
    """What calibration sums up; ``tokens`` and ``saliency`` (REAP's score) are 1 unless given."""
    logits_ET = np.asarray(logits_ET, np.float64)
    experts, count = logits_ET.shape
    tokens_E = np.ones(experts) if tokens is None else np.asarray(tokens, np.float64)
    sums = {"tokens": tokens_E, "logit_gram": logits_ET @ logits_ET.T}
    sums["gated_norm"] = tokens_E * (np.ones(experts) if saliency is None else np.asarray(saliency))
    if outputs_ETH is not None:
        outputs_ETH = np.asarray(outputs_ETH, np.float64)
        unit_ETH = outputs_ETH / np.linalg.norm(outputs_ETH, axis=-1, keepdims=True)
        sums["output_of_all"] = outputs_ETH.sum(axis=1)
        sums["output_cosine"] = np.einsum("ith,jth->ij", unit_ETH, unit_ETH)
    return LayerStatistics("layers.0.mlp", experts, 1, count, sums)
