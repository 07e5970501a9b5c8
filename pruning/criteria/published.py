"""Published criteria that are no moments of gates and norms."""

import numpy as np

from moe_spec.statistics import LayerStatistics
from pruning.criteria.scores import Scores


def seer_soft(layer: LayerStatistics) -> Scores:
    """The router's scores of the expert, added up over all tokens: ``S_e = P_e``.

    SEER-MoE's soft count, https://arxiv.org/abs/2404.05089, read as over all tokens, whichever they selected. The other
    reading is ``gate-mass``. Its authors' code and the paper's body were not to be had, so which they mean is open.
    """
    return layer["probability"]


def easy_ep(layer: LayerStatistics) -> Scores:
    """Weighted output norms, added up where they turn the hidden state: ``S_e = sum g_e ||f_e|| max(0, 1 - cos)``.

    EASY-EP, https://arxiv.org/abs/2504.06792, of which the router stays full (``--router full``). The cosine is that of
    a token's hidden state before and after the routed experts are added. The authors' code takes the residual stream
    for that state; here it is what the experts read, which most families normalise first.
    """
    return layer["gated_norm_change"]


def mone(layer: LayerStatistics) -> Scores:
    """How much an expert's output varies, times its gate mass: ``S_e = ||std(f_e)||_2 G_e``.

    The standard deviation is that over X_e of each hidden unit, with n_e below the line. MoNE's "fusion",
    https://arxiv.org/abs/2507.00390; its code estimates the deviation while the mean still moves, this is the exact
    one. MoNE puts the expert's mean output in its place, and so does a plan by this criterion (``pruning.means``).

    >>> sums = {"tokens": [2.0], "gate": [0.5], "output": [[4.0, 8.0]], "output_squared": [[10.0, 34.0]]}
    >>> mone(LayerStatistics("mlp", 1, 1, 2, {key: np.array(values) for key, values in sums.items()})).round(4)
    array([0.7071])
    """
    tokens_E1 = np.maximum(layer["tokens"], 1)[:, np.newaxis]
    mean_EH = layer["output"] / tokens_E1
    variance_EH = layer["output_squared"] / tokens_E1 - mean_EH**2
    scores: Scores = np.sqrt(np.maximum(variance_EH, 0).sum(axis=1)) * layer["gate"]  # rounding may leave less than 0
    return scores
