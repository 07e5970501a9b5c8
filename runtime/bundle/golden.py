"""Golden cases: inputs, and what ONNX Runtime makes of them, routers included."""

import dataclasses
import re
import zipfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moe_spec.dataset import Dataset, write_npz
from moe_spec.errors import UserError
from moe_spec.manifest import Manifest, TensorSpec
from moe_spec.progress import Progress, counted, silent
from moe_spec.record import Json
from moe_spec.runner import Arrays, Feeds
from runtime.backends import open_session
from runtime.model_dir import observed_file
from runtime.profiles import Profile, first_that_takes, show_options
from runtime.verification.sides import batches_of, cast_to

FOLDER = "golden"
BATCHES = 4
"""At most; random feeds are three."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        examples: of the batch.
        feeds: inputs by name.
        results: the model's outputs by name, and those of ``observed.onnx`` with gates and scores of its routers.
        profile: number of the first profile that takes it; 0 where there are none.
    """

    examples: int
    feeds: Feeds
    results: Arrays
    profile: int


def golden_cases(
    model_dir: Path,
    manifest: Manifest,
    data: Dataset | None,
    batch_size: int,
    profiles: Sequence[Profile],
    on_progress: Progress = silent,
) -> list[Case]:
    """Cases whose shapes some profile takes: of the first examples of ``data``, or of random feeds at three shapes.

    Raises:
        UserError: no profile takes any, ``data`` does not fit the model, or the model cannot run here.
    """
    with open_session(observed_file(model_dir)) as session:  # which refuses bfloat16, of which nothing can be drawn
        batches = islice(batches_of(manifest.inputs, model_dir, data, batch_size), BATCHES)
        numbered = [(feeds, first_that_takes(profiles, feeds)) for feeds, _ in batches]
        taken = [(feeds, profile) for feeds, profile in numbered if profile is not None]
        if not taken:
            raise UserError(
                f"no golden inputs fit the profile {'; '.join(map(show_options, profiles))}",
                hint="give examples that fit it with --data and --batch-size, or a wider profile",
            )
        cases = []
        for feeds, profile in counted(taken, "running golden cases", len(taken), on_progress):
            given = cast_to(session.inputs, feeds)
            cases.append(Case(len(next(iter(given.values()))), given, session.run(given), profile))
    return cases


def save_case(number: int, case: Case, outputs: Sequence[TensorSpec], directory: Path) -> Json:
    """Write case ``number`` below ``directory``, as one .npz and as raw files for trtexec; its entry in the manifest.

    Args:
        number: from 0 on.
        case: to write.
        outputs: those of the model; what its routers do is none.
        directory: of the bundle.

    Returns:
        Path of the .npz, number of examples, profile, largest magnitude among ``outputs``; by name the raw file and the
        shape of each array.
    """
    npz = f"{FOLDER}/{number}.npz"
    (directory / FOLDER / str(number)).mkdir(parents=True)
    write_npz(directory / npz, {**case.feeds, **case.results}, zipfile.ZIP_STORED)
    inputs, results = (_save_raw(number, arrays, directory) for arrays in (case.feeds, case.results))
    given = [case.results[spec.name] for spec in outputs]
    magnitude = max(float(np.abs(array[np.isfinite(array)]).max(initial=0.0)) for array in given)
    about = {"npz": npz, "examples": case.examples, "profile": case.profile, "magnitude": magnitude}
    return {**about, "inputs": inputs, "outputs": results}


def _save_raw(number: int, arrays: Mapping[str, Any], directory: Path) -> Json:
    entries = {}
    for name, array in arrays.items():
        path = f"{FOLDER}/{number}/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.bin"
        if (directory / path).exists():
            raise UserError(
                f"two inputs or outputs have the same name on a disk, one is {name!r}", hint="rename one in the graph"
            )
        np.ascontiguousarray(array).tofile(directory / path)
        entries[name] = {"file": path, "shape": list(array.shape)}
    return entries
