"""Mean outputs: what takes the place of an expert that a plan replaces."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_spec.errors import UserError
from moe_spec.layer_plan import REPLACE, LayerPlan
from moe_spec.statistics import LayerStatistics
from pruning.criteria.scores import finite


def check_replaceable(layers: Sequence[object]) -> None:
    """Refuse to replace experts of layers that are no statistics.

    Raises:
        UserError: of a model alone nobody can say what its experts give.
    """
    if not all(isinstance(layer, LayerStatistics) for layer in layers):
        raise UserError(
            f"--router {REPLACE} puts an expert's mean output in its place, which a model does not tell",
            hint="moe-edge calibrate CHECKPOINT --data DATA.npz -o statistics.safetensors, and plan with that and "
            "a criterion that ranks by statistics",
        )


def with_means(plan: LayerPlan, layer: LayerStatistics) -> LayerPlan:
    """``plan`` with what each dropped expert e gives on average: ``1/n_e sum of f_e(x) over X_e``, in float32.

    An expert that no token selected has no mean: zeros take its place. MoNE, https://arxiv.org/abs/2507.00390.

    Raises:
        UserError: the statistics lack the sum, or it is not finite.

    >>> sums = {"tokens": np.array([2, 0, 9]), "output": np.array([[4.0, 8], [0, 0], [5, 5]])}
    >>> plan = LayerPlan("mlp", 3, 1, keep=(2,), router="replace")
    >>> with_means(plan, LayerStatistics("mlp", 3, 1, 2, sums)).means_DH
    array([[2., 4.],
           [0., 0.]], dtype=float32)
    """
    dropped = list(plan.dropped)
    sums_DH = finite(layer.name, layer["output"][dropped])
    means_DH = sums_DH / np.maximum(layer["tokens"][dropped], 1)[:, np.newaxis]
    return dataclasses.replace(plan, means_DH=means_DH.astype(np.float32))
