"""PLAN.means.safetensors: what dropped experts give on average, beside the plan that puts it in their place.

One float32 tensor (D, H) a layer, under the layer's name: a row for each of its D dropped experts, ids ascending.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from moe_spec.errors import UserError
from moe_spec.files import require_file, sha256_file

Means = npt.NDArray[np.float32]
"""(D, H)."""


def means_path(plan: Path) -> Path:
    """Where the mean outputs of the plan at ``plan`` stand.

    >>> means_path(Path("out/plan.json")).as_posix()
    'out/plan.means.safetensors'
    """
    return plan.with_suffix(".means.safetensors")


def dump_means(means: Mapping[str, Means]) -> bytes:
    """The bytes of the file; equal means are equal bytes."""
    return safetensors.numpy.save({name: np.ascontiguousarray(values_DH) for name, values_DH in means.items()})


def load_means(path: Path, sha256: str, dropped: Mapping[str, int], remake: str) -> dict[str, Means]:
    """Read mean outputs. Hash, types and shapes are looked at before a tensor is read.

    Args:
        path: the file.
        sha256: of it, as the plan says.
        dropped: D of every layer that has mean outputs.
        remake: the hint of every error.

    Raises:
        UserError: the file is missing, is not the one that the plan describes, or holds something else.
    """
    require_file(path, "the mean outputs of a plan (safetensors)")
    if sha256_file(path) != sha256:
        raise UserError(f"{path} is not the file that the plan describes (sha256 differs)", hint=remake)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if names != dropped.keys():
                raise UserError(f"{path} holds layers {sorted(names)}, expected {sorted(dropped)}", hint=remake)
            for name, rows in dropped.items():
                part = file.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
                if dtype != "F32" or len(shape) != 2 or shape[0] != rows:
                    raise UserError(f"{path}: layer {name} holds {dtype}{shape}, expected F32[{rows}, H]", hint=remake)
            return {name: file.get_tensor(name) for name in dropped}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is no complete safetensors file: {error}", hint=remake) from error
