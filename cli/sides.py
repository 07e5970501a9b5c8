"""The two sides of `verify`, so that their routers can be seen: graphs are rewritten, checkpoints run in torch."""

import dataclasses
from pathlib import Path

from moe_spec.cut import ForcedModel
from moe_spec.decoder import has_cache
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256, is_checkpoint
from moe_spec.manifest import FILE_NAME, OBSERVED, Manifest
from moe_spec.plan import PLAN, PruningPlan
from runtime.backend import ENGINE
from runtime.model_dir import home
from runtime.verification.sides import Side

Opened = Path | Side
"""A directory that `runtime.verify` opens, or a checkpoint that is open in torch."""


def sides_of(
    candidate: Path, reference: Path, plan: PruningPlan | None, scratch: Path, *, trust_remote_code: bool = False
) -> tuple[Opened, Opened]:
    """Both as `runtime.verify` takes them; graphs that have to be made lie in ``scratch``.

    Args:
        candidate: as `cli.judge.judge` takes it.
        reference: likewise; without the experts that the candidate lacks where it is given back.
        plan: what was applied to the candidate; None: what it says itself.
        scratch: an empty directory.
        trust_remote_code: run the Python files that a checkpoint's config.json names (`models.own_code`).

    Raises:
        UserError: both are checkpoints, or one is missing, damaged, or not what the other was made from.
    """
    if is_checkpoint(candidate) and is_checkpoint(reference):
        raise UserError(
            f"{candidate} and {reference} are checkpoints, and only an export says how they are called",
            hint="export one of them: moe-edge export CHECKPOINT -o exported/",
        )
    applied = _applied(candidate, reference) if plan is None else plan
    if is_checkpoint(candidate):
        parent = _masked(reference, applied, scratch / "reference")
        return _in_torch(candidate, parent, applied, trust_remote_code=trust_remote_code), parent
    child = _observable(candidate, scratch / "candidate")
    if not is_checkpoint(reference):
        return child, _masked(reference, applied, scratch / "reference")
    if applied is not None and applied != _plan_in(reference):
        raise UserError(
            f"{reference} is a checkpoint, in which no plan is applied",
            hint="export it whole, and give that as --reference: moe-edge export CHECKPOINT -o exported/",
        )
    return child, _in_torch(reference, child, applied, trust_remote_code=trust_remote_code)


def forced_model(candidate: Path, scratch: Path) -> ForcedModel | None:
    """``candidate`` with its routing as inputs; None where there is no graph to change, or an op routes by itself."""
    if not candidate.exists() or is_checkpoint(candidate) or _is_engine(candidate):
        return None
    try:
        from graph_passes.variants.cut import save_forced_routing

        model = save_forced_routing(candidate, scratch)
    except (UserError, ModuleNotFoundError):
        return None
    return model if model.layers else None


def graph_of(side: Opened, scratch: Path, *, trust_remote_code: bool = False) -> Path:
    """A graph that can be cut: of a checkpoint its export to ``scratch``, which is proven to compute the same.

    Raises:
        UserError: the checkpoint cannot be exported.
        VerificationError: its export computes something else.
    """
    if not isinstance(side, Side):
        return side
    from exporter.export import export
    from exporter.tasks import task_like
    from runtime.onnxruntime.backend import OnnxRuntimeRunner

    like, blocks = side.manifest, {block.name: block for block in side.manifest.blocks}
    task, cache = task_like(spec.name for spec in like.outputs), has_cache(like.inputs)
    runner = OnnxRuntimeRunner()
    made = export(side.path, scratch, runner, task=task, cache=cache, trust_remote_code=trust_remote_code)
    named = [dataclasses.replace(block, keep=blocks[block.name].keep) for block in made.blocks]
    (scratch / FILE_NAME).unlink()
    dataclasses.replace(made, blocks=tuple(named)).save(scratch)  # ids of the model at the start, as the other side's
    return scratch


def _applied(candidate: Path, reference: Path) -> PruningPlan | None:
    """What was applied to ``candidate`` and not to ``reference``, as far as it says."""
    directory = home(reference)
    if is_checkpoint(candidate) and (directory / FILE_NAME).is_file():
        return _plan_of(candidate, Manifest.load(directory).source_sha256)  # nothing to apply to an export of it
    return _plan_in(candidate)


def _plan_in(model: Path) -> PruningPlan | None:
    """What was applied to ``model``, as far as it says."""
    if is_checkpoint(model):
        return _plan_of(model)
    directory = home(model)
    return Manifest.load(directory).plan if (directory / FILE_NAME).is_file() else None


def _plan_of(checkpoint: Path, *others: str) -> PruningPlan | None:
    """What made ``checkpoint``: the plan in it, unless that is for it, or it is itself one of the models ``others``."""
    if not (checkpoint / PLAN).is_file():
        return None
    plan, identity = PruningPlan.load(checkpoint / PLAN), checkpoint_sha256(checkpoint)
    return None if identity in (plan.model_sha256, *others) else plan


def _in_torch(checkpoint: Path, other: Path, plan: PruningPlan | None, *, trust_remote_code: bool) -> Side:
    """``checkpoint``, called as ``other`` is; ids of its experts are those of before ``plan``."""
    if not (other / FILE_NAME).is_file():
        raise UserError(f"{other} is no model or engine directory", hint="check the path")
    from exporter.torch_session import open_checkpoint

    like = Manifest.load(other)
    session, manifest = open_checkpoint(checkpoint, like, plan, trust_remote_code=trust_remote_code)
    return Side(checkpoint, manifest, session, observed=True)


def _is_engine(model: Path) -> bool:
    return (model / FILE_NAME).is_file() and Manifest.load(model).kind == ENGINE


def _observable(candidate: Path, scratch: Path) -> Path:
    """``candidate`` where its routers can be seen or it is an engine; else its graph with the routers as outputs."""
    is_known = (candidate / FILE_NAME).is_file()
    if not candidate.exists() or _is_engine(candidate) or (is_known and (candidate / OBSERVED).is_file()):
        return candidate
    from graph_passes.proof.mask import mask_model

    mask_model(candidate, None, scratch)
    return scratch


def _masked(reference: Path, applied: PruningPlan | None, scratch: Path) -> Path:
    """``reference`` where its routers can be seen and no plan has to be applied to it; else a graph made from it."""
    is_applied = _plan_in(reference) == applied and not (applied is not None and applied.shares_experts)
    missing = None if is_applied else applied  # gates of rows that share an expert are added up first
    if _is_engine(reference):
        if missing is not None:
            raise UserError(
                f"{reference} is an engine, in which no expert can be made unselectable",
                hint="give the model that the candidate was made from as --reference",
            )
        return reference
    if missing is None and (reference / OBSERVED).is_file():
        return reference
    from graph_passes.proof.mask import mask_model

    mask_model(reference, missing, scratch)
    return scratch
