"""How alike two experts are."""

import numpy as np
import numpy.typing as npt

from moe_spec.statistics import LayerStatistics

Matrix = npt.NDArray[np.float64]


def cosine(gram_EE: Matrix) -> Matrix:
    """Cosines of vectors whose inner products are ``gram_EE``; a vector of zeros has 0 with others and 1 with itself.

    >>> cosine(np.array([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    array([[1. , 0.5, 0. ],
           [0.5, 1. , 0. ],
           [0. , 0. , 1. ]])
    """
    norm_E = np.sqrt(np.maximum(gram_EE.diagonal(), np.finfo(np.float64).tiny))
    cosine_EE = np.clip(gram_EE / norm_E[:, np.newaxis] / norm_E, -1, 1)
    np.fill_diagonal(cosine_EE, 1)
    return cosine_EE


def logit_cosine(layer: LayerStatistics) -> Matrix:
    """Cosine of two experts' router logits, each a vector over all tokens, (E, E)."""
    return cosine(layer["logit_gram"])


def mean_outputs(layer: LayerStatistics) -> Matrix:
    """Mean output of every expert over all tokens, whether they selected it or not, (E, H)."""
    return layer["output_of_all"] / max(layer.token_count, 1)
