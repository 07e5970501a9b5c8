"""Code of a checkpoint's own: Python files beside its config.json that build its model, for transformers to run.

``auto_map`` in config.json names them. They run only where the user says so, from the checkpoint's directory alone:
nothing is fetched, and no file is imported that `files_of` does not list. https://huggingface.co/docs/transformers/custom_models
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_imports

from models.tensor_files import AGAIN
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.record import parse_object

OPTION = "--trust-remote-code"
"""That the command line calls ``trust_remote_code``, as transformers does."""

CONFIG = "AutoConfig"

_CLASS = re.compile(r"([^\W\d]\w*)\.[^\W\d]\w*")
"""``module.Class``, and its module."""

_HERE = "read the code that it means, put all of it into the checkpoint's directory, and name it there: module.Class"


def own_classes(directory: Path, auto_classes: Iterable[str]) -> dict[str, str]:
    """By name of an auto class: ``module.Class`` of the directory, for those of ``auto_classes`` that ``auto_map`` has.

    Raises:
        UserError: code of another repository, or a file that is not in the directory.
    """
    path, named = directory / "config.json", _auto_map(directory)
    named = {auto_class: named[auto_class] for auto_class in auto_classes if auto_class in named}
    for reference in named.values():
        if isinstance(reference, str) and "--" in reference:
            raise UserError(f"auto_map in {path} names {reference!r}, code of another repository", hint=_HERE)
        if not isinstance(reference, str) or _CLASS.fullmatch(reference) is None:
            raise UserError(f"auto_map in {path} names {reference!r}, which is no class in a file", hint=_HERE)
    files_of(directory, named)
    return named


def files_of(directory: Path, classes: Mapping[str, str]) -> dict[str, str]:
    """The files that are run when ``classes`` of `own_classes` are imported, each with its sha256.

    Raises:
        UserError: one is not in the directory.
    """
    paths = _imported(directory, classes.values())
    for path in paths:
        if path.parent != directory or not path.is_file():
            raise UserError(f"{path} is missing, which code of {directory} needs", hint=_HERE)
    return {path.name: sha256_file(path) for path in paths}


def own_class(directory: Path, reference: str) -> Any:
    """``module.Class`` of a checkpoint: runs the file, and those that it imports."""
    return get_class_from_dynamic_module(reference, directory, local_files_only=True)


def copy_code(source: Path, target: Path) -> None:
    """Copy the files that config.json of ``source`` names, as far as they are there, into directory ``target``."""
    classes = (name for name in _auto_map(source).values() if isinstance(name, str) and _CLASS.fullmatch(name))
    for path in _imported(source, classes):
        if path.parent == source and path.is_file():
            shutil.copyfile(path, target / path.name)


def _auto_map(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    named = parse_object(path, path.read_bytes(), AGAIN).get("auto_map") or {}
    if not isinstance(named, dict):
        raise UserError(f"auto_map in {path} holds a {type(named).__name__}, expected a JSON object", hint=AGAIN)
    return named


def _imported(directory: Path, classes: Iterable[str]) -> list[Path]:
    """The files of ``classes``, and those that these import as transformers understands it; they may not be there."""
    found: list[Path] = []
    modules = [name.partition(".")[0] for name in classes]
    while modules:
        path = directory / f"{modules.pop()}.py"
        if path not in found:
            found.append(path)
            modules += get_relative_imports(path) if path.is_file() else []
    return sorted(found)
