"""Which experts a task needs less and less: the rule of task-specific expert pruning, without a model.

https://arxiv.org/abs/2206.00277, of which only the abstract could be read; the rule is that of its summaries:

1. The first half of the T steps is divided into equal windows.
2. In each window every expert gathers its proficiency: hits or gates. At the window's end they are divided by their
   sum over the experts still alive, added to those of the windows before, and the total is divided by its sum again.
3. An expert whose score is below ``beta / alive`` is dropped; the best ``floor`` experts stay in any case.
4. At T/2 all but the best ``floor`` experts are dropped.

Ties go to the lower id. Scores are (E,) float64, 0 for experts that are gone.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError
from pruning.finetuning.options import EAGER, STAGED, TWO_PASS, TaskSpecific

Scores = npt.NDArray[np.float64]


def normalised(values_E: Scores, alive: Sequence[int]) -> Scores:
    """Shares of the experts in ``alive``, which sum to 1; equal ones where no value is above 0.

    >>> normalised(np.array([0.60, 0.30, 0.08, 0.02]), [0, 1]).round(3)
    array([0.667, 0.333, 0.   , 0.   ])
    """
    shares_E = np.zeros(len(values_E))
    total = values_E[list(alive)].sum()
    shares_E[list(alive)] = values_E[list(alive)] / total if total > 0 else 1 / len(alive)
    return shares_E


def best(scores_E: Scores, alive: Sequence[int], count: int) -> tuple[int, ...]:
    """The ``count`` best of ``alive``, ascending.

    >>> best(np.array([0.2, 0.4, 0.4, 0.0]), [0, 1, 2], 1)
    (1,)
    """
    return tuple(sorted(sorted(alive, key=lambda expert: (-scores_E[expert], expert))[:count]))


def survivors(scores_E: Scores, alive: Sequence[int], beta: float, floor: int) -> tuple[int, ...]:
    """Who is left of ``alive`` at the end of a window: rule 3.

    >>> survivors(np.array([0.5, 0.25, 0.25, 0.0]), range(4), beta=0.8, floor=1)
    (0, 1, 2)
    """
    kept = [expert for expert in alive if scores_E[expert] >= beta / len(alive)]
    return tuple(kept) if len(kept) >= floor else best(scores_E, alive, floor)


def drop_steps(options: TaskSpecific, steps: int) -> Mapping[int, float | None]:
    """After which of ``steps`` steps experts go: beta at the end of a window, None where all but the best go.

    >>> drop_steps(TaskSpecific(windows=2, beta=0.5), 8)
    {2: 0.5, 4: None}

    Raises:
        UserError: a window would have no step.
    """
    half = steps // 2
    windows = options.windows if options.variant == EAGER else 1
    if half < windows:
        raise UserError(
            f"the first half of {steps} steps cannot be divided into {windows} windows",
            hint=f"give at least {2 * windows} steps: --steps {2 * windows}; or fewer windows: --windows 1",
        )
    forced_at = {EAGER: half, STAGED: half, TWO_PASS: steps}[options.variant]
    ends: dict[int, float | None] = {half * window // windows: options.beta for window in range(1, windows)}
    return ends | {forced_at: None}
