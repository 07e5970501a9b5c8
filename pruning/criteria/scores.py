"""What every criterion gives."""

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
"""(E,), higher is kept."""
