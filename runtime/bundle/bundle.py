"""Write a bundle: model, golden cases, thresholds, scripts, and the hashes of all of them."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.files import new_directory, refuse_existing, sha256_file
from moe_spec.formats import in_onnx
from moe_spec.manifest import FILE_NAME, Manifest, list_files
from moe_spec.progress import Progress, counted, silent
from moe_spec.record import Json, dump
from runtime.backend import ENGINE
from runtime.bundle.golden import golden_cases, save_case
from runtime.bundle.scripts import write_scripts
from runtime.model_dir import copy_files, model_manifest, observed_file, why_not_buildable
from runtime.profiles import Profile, check_profile, default_profile, profile_to_json
from runtime.providers import find_provider
from runtime.targets import ONNXRUNTIME, Target
from runtime.tensorrt.library import PACKAGES
from runtime.verification.sides import precision_of
from runtime.verification.tolerances import tolerance_of

KIND = "bundle"
MODEL_FOLDER = "model"
SUMS = "SHA256SUMS"
THRESHOLDS = "thresholds.json"


def bundle(
    model_dir: Path,
    target: Target,
    out: Path,
    data: Dataset | None = None,
    *,
    batch_size: int = 8,
    profiles: Sequence[Profile] = (),
    precision: str | None = None,
    on_progress: Progress = silent,
) -> Manifest:
    """Write the directory ``out``; the same model, data and options give the same bytes.

    Args:
        model_dir: what `export` or `optimize` wrote, in a form that the target takes.
        target: device that the bundle is for.
        out: to write.
        data: its first examples become golden cases; without it random feeds at three shapes do.
        batch_size: examples of a golden case.
        profiles: shapes that the engine takes; without any the default one.
        precision: row of ``TOLERANCES`` to judge by; by default that of the model's coarsest number format.
        on_progress: told of every golden case, and of the files that are copied.

    Raises:
        UserError: ``out`` exists; ``model_dir`` is none, is damaged or nothing that the target takes; or it cannot run
            on ONNX Runtime's CPU provider, which computes the golden outputs.
    """
    refuse_existing(out)
    manifest = _checked(model_dir, target, on_progress)
    profiles = _profiles(manifest, target, profiles)
    precision = precision_of(model_dir, manifest) if precision is None else precision
    allowed, precision = tolerance_of(precision), in_onnx(precision)
    cases = golden_cases(model_dir, manifest, data, batch_size, profiles, on_progress)
    with new_directory(out) as staging:
        hashes = _copy_model(model_dir, manifest, staging / MODEL_FOLDER, on_progress)
        golden = [save_case(number, case, manifest.outputs, staging) for number, case in enumerate(cases)]
        (staging / THRESHOLDS).write_text(dump({"precision": precision, **vars(allowed)}) + "\n", encoding="utf-8")
        details: Json = {
            "target": target.name,
            "backend": target.backend,
            "package": PACKAGES.get(target.backend, target.backend),
            "versions": target.versions,
            "compute_capability": target.compute_capability,
            "precision": precision,
            "profiles": [profile_to_json(profile) for profile in profiles],
            "golden": golden,
        }
        write_scripts(staging, target, manifest, details)
        made = dataclasses.replace(
            manifest,
            kind=KIND,
            parent_sha256=sha256_file(model_dir / FILE_NAME),
            files=list_files(staging, hashes),
            tools={**manifest.tools, **{name: importlib.metadata.version(name) for name in ("moe-edge", "numpy")}},
            details=details,
        )
        made.save(staging)
        _save_sums(staging, made)
    return made


def _checked(model_dir: Path, target: Target, on_progress: Progress) -> Manifest:
    manifest = model_manifest(model_dir, target)
    if manifest.kind in (ENGINE, KIND):
        raise UserError(
            f"{model_dir} holds the kind {manifest.kind!r}, expected a model directory",
            hint="give the model directory that it was made from",
        )
    manifest.check_files(model_dir, on_progress)
    reasons = why_not_buildable(model_dir, target)
    if reasons:
        raise UserError(
            f"{target.name} does not take {model_dir}: {'; '.join(reasons)}",
            hint=f"moe-edge optimize {model_dir} -o DIRECTORY --target {target.name}",
        )
    if find_provider(target.provider).plugin is not None:
        raise UserError(
            f"{target.name} is reached by a plugin of ONNX Runtime, which verify.py of a bundle does not load",
            hint=f"take the model directory there: moe-edge verify --provider {target.provider}",
        )
    observed_file(model_dir)
    return manifest


def _profiles(manifest: Manifest, target: Target, given: Sequence[Profile]) -> Sequence[Profile]:
    """Those given, or the default one; none for ONNX Runtime, which takes any shape."""
    if target.backend == ONNXRUNTIME:
        if given:
            raise UserError("ONNX Runtime takes any shape and no profile", hint="leave out --optShapes and its like")
        return ()
    for profile in given:
        check_profile(profile, manifest.inputs)
    return given or (default_profile(manifest.inputs),)


def _copy_model(model_dir: Path, manifest: Manifest, folder: Path, on_progress: Progress) -> dict[str, str]:
    """Copy what the manifest lists, which has just been hashed; the hashes by their names in the bundle."""
    names = (*(entry.name for entry in manifest.files), FILE_NAME)
    copy_files(model_dir, counted(names, "copying the model", len(names), on_progress), folder)
    return {f"{MODEL_FOLDER}/{entry.name}": entry.sha256 for entry in manifest.files}


def _save_sums(staging: Path, made: Manifest) -> None:
    hashes = {entry.name: entry.sha256 for entry in made.files}
    for path in staging.rglob(FILE_NAME):
        hashes[path.relative_to(staging).as_posix()] = sha256_file(path)
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    (staging / SUMS).write_text(text, encoding="utf-8", newline="\n")
