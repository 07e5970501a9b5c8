"""Engine directories: what every backend writes beside its engine, and what must hold before one is opened."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.manifest import FILE_NAME, MODEL, OBSERVED, OBSERVED_CPU, Manifest, TensorSpec, list_files
from runtime.backend import ENGINE
from runtime.model_dir import copy_files
from runtime.profiles import Profile, profile_from_json
from runtime.targets import Target, version_fits

_GRAPHS = (MODEL, f"{MODEL}.data", OBSERVED, OBSERVED_CPU)


def profiles_of(manifest: Manifest) -> tuple[Profile, ...]:
    """The profiles that an engine was built for; none for models, and for engines that take any shape."""
    return tuple(map(profile_from_json, manifest.details.get("profiles", ())))


def finish_engine(
    model_dir: Path,
    target: Target,
    out_dir: Path,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    tools: Mapping[str, str],
    details: Mapping[str, Any],
) -> Manifest:
    """Copy what goes with the model (config.json, ...), and write the manifest that chains the engine to its parent.

    An engine has no observed outputs, so its blocks name none.
    """
    parent = Manifest.load(model_dir)
    copy_files(model_dir, (entry.name for entry in parent.files if entry.name not in _GRAPHS), out_dir)
    manifest = dataclasses.replace(
        parent,
        kind=ENGINE,
        parent_sha256=sha256_file(model_dir / FILE_NAME),
        files=list_files(out_dir),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        blocks=tuple(dataclasses.replace(block, gates=None, scores=None) for block in parent.blocks),
        tools={**parent.tools, **tools},
        details={"backend": target.backend, "target": target.name, **_judged_by(parent), **details},
    )
    manifest.save(out_dir)
    return manifest


def _judged_by(model: Manifest) -> dict[str, Any]:
    """The precision that was asked for, which also says how exact an engine can be."""
    return {"precision": model.details["precision"]} if "precision" in model.details else {}


def check_engine(engine_dir: Path, backend: str, library: str, version: str) -> Manifest:
    """The manifest of an engine that ``library`` in ``version`` can open, every file hashed.

    Raises:
        UserError: no engine, one of another backend, a damaged one, or one of another library version.
    """
    manifest = Manifest.load(engine_dir)
    if manifest.kind != ENGINE or manifest.details.get("backend") != backend:
        found = f"{manifest.kind} of {manifest.details.get('backend', 'no backend')}"
        raise UserError(f"{engine_dir} holds {found}, expected an engine of {backend}", hint=rebuild(manifest))
    try:
        manifest.check_files(engine_dir)
    except UserError as damage:
        raise UserError(damage.what, hint=rebuild(manifest)) from damage
    built = manifest.tools.get(library, "none")
    if built != version and not (manifest.details.get("version_compatible") and _is_newer(version, built)):
        raise UserError(
            f"{engine_dir} was built with {library} {built}, but {version} is installed; engines are not portable",
            hint=rebuild(manifest),
        )
    return manifest


def _is_newer(version: str, built: str) -> bool:
    """Whether what ``built`` made version-compatible runs in ``version``: newer ones of its major, or of the next."""
    return version_fits(version, f">={built},<{int(built.partition('.')[0]) + 2}")


def rebuild(manifest: Manifest) -> str:
    """The command that builds this engine again."""
    target = manifest.details.get("target", "TARGET")
    given = manifest.details.get("arguments", [])
    return " ".join(
        ["build it again: moe-edge build MODEL_DIRECTORY -o ENGINE_DIRECTORY", f"--target {target}", *given]
    )
