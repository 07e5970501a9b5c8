"""What a plan is to keep: its options, and which of them exclude each other."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError, require_known
from moe_spec.feasibility import ANY, Kernels
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import REPLACE, ROWS, UNTOUCHED
from pruning.budget.keep import Keep, check_budget
from pruning.budget.scopes import SCOPES, SEARCHED
from pruning.criteria import CHANGE_CRITERIA
from pruning.merging.mergers import MERGERS
from pruning.merging.plan import check_merging
from pruning.routers import check_clamp, check_router

PUBLISHED: Mapping[str, str] = {"mone": REPLACE}
"""Routers of criteria that remove no rows in their papers, unless the user says otherwise."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What to keep.

    Attributes:
        keep: experts a layer keeps: a count (int), or a share (float above 0 and at most 1).
        criterion: a name in ``pruning.criteria``, or ``s(b,alpha,beta)``; or one of ``pruning.merging``, which merges
            experts into as many as it would keep.
        scope: ``layer`` (the same count everywhere) or ``global`` (one ranking over all layers); with data also
            ``searched`` (what changes least of what the model says).
        seed: of the criterion ``random``, and of routers that are drawn anew.
        clamp_top_k: let K shrink where fewer than K experts can be selected.
        router: ``rows`` (a token that chose a dropped expert gets its next best survivor), ``full`` (it gets nothing
            from it; K stays, and fewer than K experts may be kept) or ``replace`` (as ``full``, but it gets the
            expert's mean output). Where experts are merged ``rows``, ``mean``, ``new`` or ``alias`` of
            ``ROUTERS``. Empty is ``rows``, or what is nearest to the paper of ``mone`` and of mergers.
        protect: keep super experts (``pruning.criteria.protection``) before all others.
        pretrained: the checkpoint before fine-tuning, for criteria that compare with it; plans hold its hash.
        floor: experts that every layer keeps at least.
        kernels: what the target takes; a share is rounded to it, a count that it does not take is refused.
    """

    keep: Keep
    criterion: str = "reap"
    scope: str = "layer"
    seed: int = 0
    clamp_top_k: bool = False
    router: str = ""
    protect: bool = False
    pretrained: Path | None = None
    floor: int = 1
    kernels: Kernels = ANY

    def __post_init__(self) -> None:
        if not self.router:
            own = MERGERS[self.criterion].router if self.criterion in MERGERS else PUBLISHED.get(self.criterion, ROWS)
            object.__setattr__(self, "router", own)

    def recorded(self) -> dict[str, Any]:
        """As they stand in plan.json. A path says nothing elsewhere, so the hash of what it leads to does."""
        recorded = dataclasses.asdict(self) | {
            "pretrained": self.pretrained and checkpoint_sha256(self.pretrained),
            "target": self.kernels.target or None,
        }
        return {key: value for key, value in recorded.items() if key not in ("criterion", "kernels")}


def check_options(options: PlanOptions) -> None:
    """Refuse options that no criterion could be planned with.

    Raises:
        UserError: a budget that is none, an unknown scope or router, or options that exclude each other.
    """
    check_budget(options.keep, str(options.keep))
    require_known(options.scope, "scope", [*SCOPES, SEARCHED])
    if options.kernels.counts and (options.scope != "layer" or options.router in UNTOUCHED):
        raise UserError(
            f"--scope {options.scope} --router {options.router} cannot be had on target {options.kernels.target}: it "
            "builds from a checkpoint, where every layer has as many experts, and its router as many rows",
            hint="plan with --scope layer --router rows, or choose another --target",
        )
    if options.criterion in MERGERS:
        check_merging(options.criterion, options.router, protect=options.protect)
        check_clamp(options.router, clamp_top_k=options.clamp_top_k)
    else:
        check_router(options.router, clamp_top_k=options.clamp_top_k)
    if options.pretrained is not None and options.criterion not in CHANGE_CRITERIA:
        raise UserError(
            f"criterion {options.criterion!r} compares with no other checkpoint",
            hint=f"leave out --pretrained; it is for --criterion {' or '.join(CHANGE_CRITERIA)}",
        )
