"""Build an engine: every reason against it is looked for before any work."""

from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import refuse_existing
from moe_spec.manifest import Manifest
from moe_spec.progress import Progress, silent
from runtime.backend import ENGINE, BuildOptions
from runtime.backends import BACKENDS
from runtime.fit import GIGABYTE, fit
from runtime.model_dir import model_manifest, unknown_formats, why_not_buildable
from runtime.targets import TARGETS, Target


def build(
    model_dir: Path, target: Target, options: BuildOptions, out: Path, on_progress: Progress = silent
) -> Manifest:
    """Write the engine directory ``out`` for ``target`` from a model directory.

    Its manifest's ``parent_sha256`` is the hash of the model directory's manifest.json. ``on_progress`` is told of each
    phase of the build, where the backend tells.

    Raises:
        UserError: ``out`` exists, ``model_dir`` is none or is damaged, the target cannot take it, or the build fails.
    """
    refuse_existing(out)
    manifest = model_manifest(model_dir, target)
    if manifest.kind == ENGINE:
        raise UserError(f"{model_dir} is an engine already", hint="give the model directory that it was built from")
    manifest.check_files(model_dir, on_progress)
    backend = BACKENDS[target.backend]
    rows = (target, *options.also)
    reasons = [reason for row in rows for reason in backend.why_not(model_dir, row)]
    if reasons:
        possible = [row.name for row in TARGETS if not BACKENDS[row.backend].why_not(model_dir, row)]
        raise UserError(
            f"{model_dir} cannot be built for {target.name}: {'; '.join(reasons)}",
            hint=f"as it is, it can be built here for {', '.join(possible) or 'no target'}"
            + next(filter(None, (_rewrite(model_dir, row) for row in rows)), ""),
        )
    for row in rows:
        _refuse_unfit(model_dir, manifest, row, options)
    return backend.build(model_dir, target, options, out, on_progress)


def _rewrite(model_dir: Path, target: Target) -> str:
    """The command that writes a graph which ``target`` takes; empty where the graph is not what keeps it."""
    options = f"-o DIRECTORY --target {target.name}"
    if unknown_formats(model_dir, target):
        return f"; write one from the float model: moe-edge optimize FLOAT_MODEL {options} --precision int8"
    if why_not_buildable(model_dir, target):
        return f"; write a graph for it: moe-edge optimize {model_dir} {options}"
    return ""


def _refuse_unfit(model_dir: Path, manifest: Manifest, target: Target, options: BuildOptions) -> None:
    """Refuse what no such device can hold, even without what its activations take."""
    found = fit(model_dir, manifest, target, options.profiles)
    streamed = found.weights if options.weight_streaming else 0
    if found.memory is not None and found.needs - streamed > found.memory[1]:
        raise UserError(
            f"{model_dir} needs {found.needs / GIGABYTE:.1f} GB at its largest shapes (weights "
            f"{found.weights / GIGABYTE:.1f}, cache {found.cache / GIGABYTE:.1f}), the largest {target.name} has "
            f"{found.memory[1] / GIGABYTE:.0f} GB",
            hint=f"keep fewer experts, quantise them, or give smaller --maxShapes: moe-edge targets {model_dir}",
        )
