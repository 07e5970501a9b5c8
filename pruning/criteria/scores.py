"""What every criterion gives."""

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError

Scores = npt.NDArray[np.float64]
"""(E,), higher is kept."""


def finite(layer: str, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``values``, scores or statistics of that layer.

    Raises:
        UserError: some are infinite or no numbers.
    """
    if not np.isfinite(values).all():
        raise UserError(
            f"the statistics of layer {layer} are not finite: the model overflowed on the calibration data",
            hint="calibrate again, with data that the model can take",
        )
    return values
