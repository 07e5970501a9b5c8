"""Choose which experts stay in each layer, by a criterion and a budget, or by name.

The plan is a small JSON file that prune, export and optimize carry out. --keep is the budget: experts a layer (4), or a
share of them (50%). A criterion ranks the experts of a layer; ties go to the lower id.

Criteria by statistics: reap, frequency, seer-actual, gate-mass, seer-soft, ean, man, msan, task, task-squared, easy-ep,
mone; and any s(b,alpha,beta), the sum of gate^alpha norm^beta over the n tokens of an expert, divided by n^b.
Criteria without data: random; aimer, by a checkpoint's weights; router-norm, by how much longer an expert's row of the
router became in fine-tuning (--pretrained is the checkpoint before). Or name the experts that stay: --experts.

Mergers average experts instead of dropping them: uncurl, m-smoe, hc-smoe, hc-smoe-cosine, ream. --keep is how many a
layer has afterwards; hc-smoe and ream need statistics of calibrate --dense.

With --data a checkpoint is planned for on task data at once: by any criterion by statistics or merger, in --rounds of
pruning and looking again; or by naee, which searches for the experts whose absence changes a layer's output least. The
budget may then be the --max-size of the checkpoint or the --max-latency of one example, which is measured: five plans
are exported, optimized and timed here, on one thread. Fewer experts take less memory. Where a token runs its K experts
only, it still runs K, and is hardly quicker.

--router says what becomes of the router. Dropped experts: rows removes theirs, so that a token gets its next best
survivor; full leaves it, so that a token gets nothing from an expert that is gone; replace leaves it too, and the token
gets the expert's mean output. Merged ones: rows keeps the survivor's, mean averages those of a group, new draws new
ones, to be trained, alias leads all rows of a group to its one expert. What keeps its router is carried out by
optimize, on the exported model.

Example: moe-edge plan statistics.safetensors --keep 50% -o plan.json
Example: moe-edge plan statistics.safetensors --criterion "s(0,1,1)" --keep 4 --scope global -o global.json
Example: moe-edge plan checkpoint/ --data train.npz --criterion naee --keep 6 -o naee.json
Example: moe-edge plan exported/ --experts 0,2,5 --experts layers.3.mlp=1,4 -o by-hand.json
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import AsJson, Output, TrustRemoteCode
from cli.trust import warn_of_code
from moe_spec.errors import UserError
from moe_spec.files import refuse_existing

if TYPE_CHECKING:
    from moe_spec.plan import PruningPlan
    from pruning.budget.limit import AtMost
    from pruning.layers import ModelLayers
    from pruning.options import PlanOptions
    from pruning.plan_on_data import DataOptions


BY_HAND = frozenset({"source", "output", "experts", "clamp_top_k", "router", "target", "trust_remote_code", "as_json"})
"""What goes with --experts; anything else would rank."""

OF_DATA = ("rounds", "batch_size", "limit", "trials")
"""What goes with --data only."""


def plan(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(help="What calibrate wrote; or a checkpoint, a model directory or an .onnx file.")
    ],
    output: Output,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT|SHARE",
            help="Experts that a layer keeps: a count (4) or a share (0.5, 50%), rounded, at least one.",
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(metavar="IDS", help="Experts to keep, by id: 0,2,5 in every layer, or LAYER=0,2,5 in one."),
    ] = None,
    criterion: Annotated[str, typer.Option(metavar="NAME", help="What ranks experts, see above.")] = "reap",
    scope: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="layer: the same count in each layer. global: one ranking over all. searched: with --data, the "
            "counts for which the model's own answers are accepted most.",
        ),
    ] = "layer",
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|SHARE",
            help="Instead of --keep: bytes of the checkpoint's tensors, 30MB, or 60% of what they are.",
        ),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|SHARE",
            help="Instead of --keep: time of one example on one thread of this CPU, 3ms, or 60% of what it is.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Plans that --scope searched tries.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of criterion random.")] = 0,
    clamp_top_k: Annotated[
        bool,
        typer.Option(
            "--clamp-top-k", help="Let K shrink where fewer experts than K stay; without it that is an error."
        ),
    ] = False,
    router: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="rows, full or replace; of mergers rows, mean, new or alias. By default rows, or what the "
            "criterion's paper does.",
        ),
    ] = "",
    protect: Annotated[
        bool,
        typer.Option(
            "--protect", help="Keep super experts, whose outputs are far larger than all others', whatever they score."
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Task data, .npz: plan on it, without statistics. The model runs on the CPU, unlike in calibrate."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Prune in so many steps, and look at the data again after each.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a forward pass.")] = 32,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first so many examples; all without it.")
    ] = None,
    pretrained: Annotated[
        Path | None, typer.Option(help="For router-norm: the checkpoint before it was fine-tuned.")
    ] = None,
    floor: Annotated[int, typer.Option(help="Experts that every layer keeps at least.")] = 1,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Keep as many as that target's kernels take: edge-llm-fp16 takes 128 or 256 experts. Without it "
            "any number.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write plan.json."""
    from moe_spec.feasibility import ANY
    from moe_spec.layer_plan import ROWS
    from moe_spec.plan import BYTES, MILLISECONDS
    from pruning.budget.keep import parse_keep
    from pruning.budget.limit import FLAGS
    from pruning.by_hand import parse_experts, plan_by_hand
    from pruning.options import PlanOptions
    from pruning.plan import plan as run
    from runtime.targets import kernels_of

    if sum(budget is not None for budget in (keep, max_size, max_latency, experts)) != 1:
        raise UserError(
            "a plan needs --keep, --max-size, --max-latency or --experts, one of them",
            hint="--keep 4, --max-size 60%, --max-latency 3ms, or --experts 0,2,5",
        )
    _check_given(context, by_hand=experts is not None, on_data=data is not None)
    at_most = _at_most({BYTES: max_size, MILLISECONDS: max_latency})
    if at_most is not None and data is None:
        flag = f"{FLAGS[at_most.unit]} {at_most.written}"
        raise UserError(f"{flag} is spent on data", hint=f"moe-edge plan CHECKPOINT --data DATA.npz {flag}")
    kernels = ANY if target is None else kernels_of(target)
    warn_of_code(source, pretrained, trusted=trust_remote_code)
    if experts is None:
        share = 1.0 if keep is None else parse_keep(keep)
        options = PlanOptions(share, criterion, scope, seed, clamp_top_k, router, protect, pretrained, floor, kernels)
        if data is None:
            with console.progress(f"ranking the experts of {source}"):
                made = run(source, options, output, _layers_of, trust_remote_code=trust_remote_code)
        else:
            with console.progress("loading torch"):
                from pruning.plan_on_data import DataOptions

            how = DataOptions(rounds, batch_size, limit, at_most, trials)
            made = _on_data(source, data, options, output, how, target, trust_remote_code=trust_remote_code)
    else:
        refuse_existing(output)
        named = parse_experts(experts or [])
        with console.progress(f"reading {source}"):
            layers = _layers_of(source, trust_remote_code=trust_remote_code)
        made = plan_by_hand(layers, named, clamp_top_k=clamp_top_k, router=router or ROWS, kernels=kernels)
        made.save(output)
    console.result(f"{output}: {_summary(made, output)}", {"output": str(output), **made.to_json()}, as_json)


def _check_given(context: typer.Context, *, by_hand: bool, on_data: bool) -> None:
    """Refuse options that would be ignored."""
    from pruning.finetuning.flags import flag

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    ranking = [flag(name) for name in given if name not in BY_HAND]
    if by_hand and ranking:
        raise UserError(
            f"--experts names the experts that stay, and leaves nothing to {ranking[0]}",
            hint=f"leave out {' and '.join(ranking)}, or --experts",
        )
    looking = [flag(name) for name in OF_DATA if name in given]
    if looking and not on_data:
        raise UserError(f"{looking[0]} is about looking at data, but there is none", hint="name it: --data DATA.npz")


def _at_most(written: Mapping[str, str | None]) -> "AtMost | None":
    """The one of several budgets, by their units, that is given."""
    from pruning.budget.limit import AtMost

    return next((AtMost.parse(text, unit) for unit, text in written.items() if text is not None), None)


def _summary(plan: "PruningPlan", output: Path) -> str:
    kept, total = (sum(counts) for counts in zip(*((len(one.keep), one.experts) for one in plan.layers), strict=True))
    summary = f"keeps {kept} of {total} experts in {len(plan.layers)} layers, {plan.by}"
    if plan.merges:
        summary = f"merges {total} experts in {len(plan.layers)} layers into {kept}, {plan.by}"
    notes = (f"  note: {note}" for note in _notes(plan))
    return "\n".join([summary, *notes, *_means(plan, output), *_spent(plan.options)])


def _notes(plan: "PruningPlan") -> Iterator[str]:
    """Where the plan is not what the paper of its criterion does."""
    from pruning.criteria import NOTES
    from pruning.merging.mergers import MERGERS

    if plan.merges:
        yield from MERGERS[plan.criterion].notes(plan.layers[0].router)
    if plan.criterion in NOTES:
        yield NOTES[plan.criterion]
    exact = plan.options.get("exact", [])
    if not all(exact):
        yield (
            f"{exact.count(False)} of {len(exact)} layers have too many subsets to try them all: their experts went "
            "one by one, each time the one that is missed least"
        )


def _means(plan: "PruningPlan", output: Path) -> Iterator[str]:
    """Where what takes the place of experts stands."""
    from moe_spec.means import means_path

    if plan.means:
        unknown = sum(int((~means_DH.any(axis=1)).sum()) for means_DH in plan.means.values())
        zeros = f", zeros for {unknown} that no token selected" if unknown else ""
        yield f"  {means_path(output)}: the mean outputs of the others{zeros}"


def _spent(options: Mapping[str, Any]) -> Iterator[str]:
    """What a plan that was made to a budget cost, and what a search was worth."""
    if budget := options.get("budget"):
        counts = ", ".join(f"{budget[key]:,.10g} {key}" for key in ("spent", "most", "whole"))
        yield f"  {budget['unit']}: {counts}"
    if search := options.get("search"):
        values = ", ".join(f"{scope} {value:.4f}" for scope, value in search["acceptance"].items())
        yield f"  acceptance: {values}, the best of {search['trials']} plans"


def _on_data(
    checkpoint: Path,
    data: Path,
    options: "PlanOptions",
    output: Path,
    how: "DataOptions",
    target: str | None,
    *,
    trust_remote_code: bool,
) -> "PruningPlan":
    from moe_spec.plan import MILLISECONDS
    from pruning.plan_on_data import plan_on_data

    with console.progress(f"loading {checkpoint}") as tell:
        if how.at_most is not None and how.at_most.unit == MILLISECONDS:
            from cli.latency import measure_on_cpu

            measure = measure_on_cpu(checkpoint, target, tell, trust_remote_code=trust_remote_code)
            how = dataclasses.replace(how, measure=measure)
        return plan_on_data(
            checkpoint, data, options, output, how, on_progress=tell, trust_remote_code=trust_remote_code
        )


def _layers_of(source: Path, *, trust_remote_code: bool) -> "ModelLayers":
    """The MoE layers of a checkpoint or an ONNX model."""
    from moe_spec.identity import is_onnx
    from pruning.layers import LayerShape, ModelLayers, of_checkpoint

    if not is_onnx(source):
        return of_checkpoint(source, trust_remote_code=trust_remote_code)
    from graph_passes.describe import read_model

    model = read_model(source)
    shapes = (
        LayerShape(block.name, block.num_experts, block.router.top_k, block.router.groups) for block in model.blocks
    )
    return ModelLayers(model.model_sha256, tuple(shapes))
