"""Build an engine: every reason against it is looked for before any work."""

from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import refuse_existing
from moe_spec.manifest import FILE_NAME, Manifest
from runtime.backend import ENGINE, BuildOptions
from runtime.backends import BACKENDS
from runtime.fit import GIGABYTE, NO, fit
from runtime.model_dir import model_file, why_not_buildable
from runtime.targets import TARGETS, Target


def build(model_dir: Path, target: Target, options: BuildOptions, out: Path) -> Manifest:
    """Write the engine directory ``out`` for ``target`` from a model directory.

    Its manifest's ``parent_sha256`` is the hash of the model directory's manifest.json.

    Raises:
        UserError: ``out`` exists, ``model_dir`` is none or is damaged, the target cannot take it, or the build fails.
    """
    refuse_existing(out)
    model_file(model_dir)
    if not (model_dir / FILE_NAME).is_file():
        raise UserError(
            f"{model_dir} is no model directory: it has no {FILE_NAME}",
            hint=f"make one: moe-edge optimize {model_dir} -o DIRECTORY --target {target.name}",
        )
    manifest = Manifest.load(model_dir)
    if manifest.kind == ENGINE:
        raise UserError(f"{model_dir} is an engine already", hint="give the model directory that it was built from")
    manifest.check_files(model_dir)
    backend = BACKENDS[target.backend]
    reasons = backend.why_not(model_dir, target)
    if reasons:
        possible = [row.name for row in TARGETS if not BACKENDS[row.backend].why_not(model_dir, row)]
        rewrite = f"; write a graph for it: moe-edge optimize {model_dir} -o DIRECTORY --target {target.name}"
        raise UserError(
            f"{model_dir} cannot be built for {target.name}: {'; '.join(reasons)}",
            hint=f"as it is, it can be built here for {', '.join(possible) or 'no target'}"
            + (rewrite if why_not_buildable(model_dir, target) else ""),
        )
    _refuse_unfit(model_dir, manifest, target, options)
    return backend.build(model_dir, target, options, out)


def _refuse_unfit(model_dir: Path, manifest: Manifest, target: Target, options: BuildOptions) -> None:
    """Refuse what no such device can hold, even without what its activations take."""
    found = fit(model_dir, manifest, target, () if options.profile is None else (options.profile,))
    if found.fits == NO and found.memory is not None:
        raise UserError(
            f"{model_dir} needs {found.needs / GIGABYTE:.1f} GB at its largest shapes (weights "
            f"{found.weights / GIGABYTE:.1f}, cache {found.cache / GIGABYTE:.1f}), the largest {target.name} has "
            f"{found.memory[1] / GIGABYTE:.0f} GB",
            hint=f"keep fewer experts, quantise them, or give smaller --maxShapes: moe-edge targets {model_dir}",
        )
