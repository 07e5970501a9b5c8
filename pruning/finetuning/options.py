"""The methods and their options. Needs no torch."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError, require_known
from pruning.finetuning.flags import flag, require

EAGER, STAGED, TWO_PASS = "eager", "staged", "two-pass"
VARIANTS: Mapping[str, str] = {
    EAGER: "experts go at the end of every window of the first half; the second half trains the one that is left",
    STAGED: "all but the best go at once, at half time",
    TWO_PASS: "a first run finds the best expert, a second one trains only that, from the weights of the checkpoint",
}
"""When `TaskSpecific` drops experts. The survey that names the three does not define them: these are our readings."""

HIT_RATE, ALPHA = "hit-rate", "alpha"
SCORES: Mapping[str, str] = {
    HIT_RATE: "the share of the tokens that selected the expert",
    ALPHA: "the share of the gates that the expert was given",
}
"""How proficient `TaskSpecific` finds an expert."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """The task's loss and nothing else: what a pruned model needs to recover."""


@dataclasses.dataclass(frozen=True)
class FullRouter:
    """The task's loss, behind routers that stay as they are: how https://arxiv.org/abs/2405.16646 recovers.

    Attributes:
        plan: for the checkpoint, made with ``--router full``. What it drops gives nothing, and learns nothing.
    """

    plan: Path


@dataclasses.dataclass(frozen=True)
class TaskSpecific:
    """Drop the experts that the task does not need while it is learned, https://arxiv.org/abs/2206.00277.

    The rule is the one of `pruning.finetuning.proficiency`. The paper's beta, number of windows and default score
    could not be verified; the defaults here are ours. Routers are trained along; whether the paper's are is unknown.

    Attributes:
        score: one of `SCORES`.
        variant: one of `VARIANTS`.
        windows: equal parts of the first half of the steps; experts go at the end of each.
        beta: an expert goes whose score is below ``beta / alive``. At most 1, so that the best one never goes.
        floor: experts that every layer keeps whatever they score, and with which it ends. 1 in the paper.
    """

    score: str = ALPHA
    variant: str = EAGER
    windows: int = 5
    beta: float = 0.5
    floor: int = 1

    def __post_init__(self) -> None:
        require_known(self.score, "score", SCORES)
        require_known(self.variant, "variant", VARIANTS)
        require(self.windows >= 1, "windows", self.windows, "at least 1")
        require(0 < self.beta <= 1, "beta", self.beta, "above 0 and at most 1")
        require(self.floor >= 1, "floor", self.floor, "at least 1")


@dataclasses.dataclass(frozen=True)
class Seer:
    """The second stage of SEER-MoE, https://arxiv.org/abs/2404.05089: routers become decisive, and K smaller.

    ``loss = task + entropy_weight * H(p)``, the mean over layers and tokens, ``p`` the router's distribution over the
    experts. The paper's weight and schedule could not be recovered; those here are ours.

    Attributes:
        entropy_weight: lambda, on the entropy.
        top_k: K at the end; None leaves it as it is.
        lower_at: the steps after which K falls by one; empty spreads them evenly over the first half.
    """

    entropy_weight: float = 0.01
    top_k: int | None = None
    lower_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(0 <= self.entropy_weight < math.inf, "entropy_weight", self.entropy_weight, "0 or more")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")


@dataclasses.dataclass(frozen=True)
class RouterKD:
    """Only the routers learn, to give what a teacher gives, https://arxiv.org/abs/2603.02217. Data needs no labels.

    ``loss = KL(softmax(teacher / temperature) || softmax(model / temperature)) * temperature ** 2``, mean over the
    examples, or the tokens of a language model.

    Attributes:
        teacher: checkpoint to imitate: the model before it was pruned.
        temperature: above 1 the teacher's small probabilities count for more. The paper's is not known.
    """

    teacher: Path
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0")


Method = Plain | FullRouter | TaskSpecific | Seer | RouterKD

METHODS: Mapping[str, type[Plain] | type[FullRouter] | type[TaskSpecific] | type[Seer] | type[RouterKD]] = {
    "plain": Plain,
    "full-router": FullRouter,
    "task-specific": TaskSpecific,
    "seer": Seer,
    "router-kd": RouterKD,
}
"""Every method, by the name that the command line and plans call it."""


_WANTED: Mapping[str, str] = {"teacher": "CHECKPOINT", "plan": "plan.json"}


def method(name: str, options: Mapping[str, Any]) -> Method:
    """The method called ``name``, with the options that are given; the others are its defaults.

    Raises:
        UserError: an unknown method, an option of another one, none that it needs, or one out of range.

    >>> method("seer", {"top_k": 1})
    Seer(entropy_weight=0.01, top_k=1, lower_at=())
    """
    require_known(name, "method", METHODS)
    fields = {field.name: field for field in dataclasses.fields(METHODS[name])}
    for option in options:
        if option not in fields:
            raise UserError(
                f"{flag(option)} is no option of --method {name}",
                hint=f"its options are: {', '.join(flag(field) for field in fields) or 'none'}",
            )
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.name not in options:
            raise UserError(
                f"--method {name} needs {flag(field.name)}", hint=f"{flag(field.name)} {_WANTED[field.name]}"
            )
    return METHODS[name](**options)


def name_of(method: Method) -> str:
    """What `METHODS` calls ``method``.

    >>> name_of(Plain())
    'plain'
    """
    return next(name for name, kind in METHODS.items() if isinstance(method, kind))
