"""What ONNX Runtime made of a graph when it was opened, kept for the next time.

An entry is a directory named after everything that its content depends on: the model, ONNX Runtime's version, this kind
of CPU, the provider and its options. It holds the weights too, as they are and as this CPU's kernels pack them: these
are mapped, so a session takes less memory. An entry is hashed before it is used, and made again where it is damaged;
where two processes make the same one, the first is kept.
"""

import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import inside, new_directory, sha256_file, sha256_text
from moe_spec.manifest import MODEL
from runtime.execution import Execution
from runtime.onnx_file import check_external_data

LOGGER = logging.getLogger("moe_edge.cache")

SUMS = "SHA256SUMS"

_CPU_INFO = Path("/proc/cpuinfo")


def kept_graph(source: Path, execution: Execution, version: str, make: Callable[[Path], object]) -> Path:
    """The optimised graph of ``source`` in ``execution.cache``; ``make`` writes it where it is not there yet.

    Raises:
        UserError: the disk is full, or ``make`` fails.
    """
    entry = _entry(source, execution, version)
    damage = _damage(entry) if entry.exists() else None
    if damage is not None:
        LOGGER.warning("%s is damaged (%s): it is made again", entry, damage)
        _remove(entry)
    if not entry.exists():
        _make(entry, make)
    return entry / MODEL


def directory_for_provider(source: Path, execution: Execution, version: str) -> Path:
    """Where the provider itself keeps what it compiles of ``source``. What is in it is not checked here."""
    entry = _entry(source, execution, version)
    entry.mkdir(parents=True, exist_ok=True)
    return entry


def _entry(source: Path, execution: Execution, version: str) -> Path:
    assert execution.cache is not None
    locations = {tensor.location for tensor in check_external_data(source) if tensor.location is not None}
    known_by = {
        "graph": sha256_file(source),
        "weights": {name: sha256_file(inside(source.parent, name, source)) for name in sorted(locations)},
        "onnxruntime": version,
        "cpu": _cpu(),
        "provider": execution.asked.official,
        "options": dict(execution.options),
    }
    return execution.cache / sha256_text(json.dumps(known_by, sort_keys=True))


def _cpu() -> str:
    """The processor's instruction sets where the system lists them, else its name: weights are packed for these."""
    listed = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    instructions = next((line for line in listed if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {instructions}"


def _make(entry: Path, make: Callable[[Path], object]) -> None:
    try:
        with new_directory(entry) as staging:
            make(staging / MODEL)
            sums = {path.name: sha256_file(path) for path in sorted(staging.iterdir())}
            (staging / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    except UserError:
        if not entry.exists():  # else another process was quicker
            raise


def _damage(entry: Path) -> str | None:
    """What is wrong with an entry."""
    try:
        lines = (entry / SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        found = {path.name: sha256_file(path) for path in entry.iterdir() if path.name != SUMS}
    except (OSError, ValueError) as error:
        return str(error)
    if MODEL not in sums:
        return f"{SUMS} names no {MODEL}"
    different = sorted(name for name in sums.keys() | found.keys() if sums.get(name) != found.get(name))
    return f"{', '.join(different)} changed" if different else None


def _remove(entry: Path) -> None:
    """Out of the way first, all at once: another process may be doing the same."""
    aside = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        entry.rename(aside / entry.name)
    except FileNotFoundError:
        pass
    finally:
        shutil.rmtree(aside)
