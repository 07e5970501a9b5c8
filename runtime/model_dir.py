"""Where the graph is, and whether a target takes it."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import inside, not_there
from moe_spec.manifest import EXPERT_CHOICE, FILE_NAME, MODEL, OBSERVED, OBSERVED_CPU, Manifest
from runtime.backend import ENGINE, ENGINE_FILE
from runtime.onnx_file import check_external_data, number_formats
from runtime.targets import Target


def model_file(path: Path) -> Path:
    """The graph of ``path``, an .onnx file or a model directory.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        model = path / MODEL
        if not model.is_file():
            raise UserError(
                f"{path} is no model directory: it has no {MODEL}", hint="give what export or optimize wrote"
            )
        return model
    if not path.is_file():
        raise not_there(path, "an .onnx file or a model directory")
    return path


def home(model: Path) -> Path:
    """The directory of an .onnx file, or the model directory itself."""
    return model if model.is_dir() else model.parent


def with_manifest(model: Path) -> Path:
    """The model directory of which ``model`` is the graph, for its manifest knows more; anything else as it is.

    Raises:
        UserError: that manifest is damaged.
    """
    known = model.name == MODEL and (model.parent / FILE_NAME).is_file()
    return model.parent if known and Manifest.load(model.parent).kind != ENGINE else model


def model_manifest(model_dir: Path, target: Target) -> Manifest:
    """What stands in the manifest of a model directory that is meant for ``target``; its files are not looked at.

    Raises:
        UserError: there is no such directory, or it has no manifest.
    """
    if not (model_dir / FILE_NAME).is_file():
        model_file(model_dir)
        raise UserError(
            f"{model_dir} is no model directory: it has no {FILE_NAME}",
            hint=f"make one: moe-edge optimize {model_dir} -o DIRECTORY --target {target.name}",
        )
    return Manifest.load(model_dir)


def copy_files(model_dir: Path, names: Iterable[str], target: Path) -> None:
    """Copy files that the manifest of ``model_dir`` names to the same names below ``target``.

    Raises:
        UserError: a name leads out of ``model_dir``.
    """
    for name in names:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(model_dir, name, model_dir / FILE_NAME), copy)


def observed_file(model_dir: Path) -> Path:
    """The graph of a model directory that shows what its routers did, as ONNX Runtime runs it on a CPU.

    Raises:
        UserError: there is none.
    """
    if (model_dir / OBSERVED_CPU).is_file():
        return model_dir / OBSERVED_CPU
    observed = model_dir / OBSERVED
    if not observed.is_file():
        raise UserError(
            f"{model_dir} has no {OBSERVED}, so its routers cannot be observed",
            hint="give a directory that `moe-edge export` or `moe-edge optimize` wrote",
        )
    return observed


def model_bytes(path: Path) -> int:
    """Bytes of what runs: the graph and its weights, or the engine."""
    if (path / ENGINE_FILE).is_file():
        return (path / ENGINE_FILE).stat().st_size
    onnx = model_file(path)
    locations = {tensor.location for tensor in check_external_data(onnx) if tensor.location is not None}
    return onnx.stat().st_size + sum(inside(onnx.parent, name, onnx).stat().st_size for name in locations)


def why_not_buildable(model_dir: Path, target: Target) -> list[str]:
    """Reasons in the model why ``target`` cannot take it: a form or a number format that it does not know."""
    manifest = Manifest.load(model_dir)
    reasons = [
        f"layer {block.name} has the form {block.form!r}, {target.name} takes {', '.join(target.forms)}"
        for block in manifest.blocks
        if block.form not in (*target.forms, EXPERT_CHOICE)
    ]
    unknown = unknown_formats(model_dir, target)
    if unknown:
        takes = ", ".join(sorted(target.precisions))
        reasons.append(f"{MODEL} holds {', '.join(unknown)}, {target.name} takes {takes}")
    return reasons


def unknown_formats(model_dir: Path, target: Target) -> list[str]:
    """Number formats of the model that ``target`` has no kernels for."""
    return sorted(set(number_formats(check_external_data(model_file(model_dir)))) - target.precisions)
