"""Files that are either the old ones or the new ones, never half of one; and paths that stay where they belong."""

import contextlib
import difflib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.progress import Progress, silent
from moe_spec.staging import staging_directory

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says of a disk that is full, of one's share of it, and of a file that is larger than any may be."""

_PIECE = 1 << 20


def is_full(error: OSError) -> bool:
    """Whether a disk, or what one may have of it, cannot hold more."""
    return error.errno in _FULL


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in chunks."""
    return sha256_files([path])[0]


def sha256_files(paths: Sequence[Path], on_progress: Progress = silent) -> list[str]:
    """The hex digest of each file; ``on_progress`` is told of the bytes of all of them."""
    digests, done, total = [], 0, sum(path.stat().st_size for path in paths)
    on_progress("hashing files", 0, total)
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                done += len(piece)
                on_progress("hashing files", done, max(done, total))
        digests.append(digest.hexdigest())
    return digests


def sha256_text(text: str) -> str:
    """Hex digest of a text in UTF-8.

    >>> sha256_text("moe")[:8]
    '4b6f50ec'
    """
    return hashlib.sha256(text.encode()).hexdigest()


def require_file(path: Path, what: str) -> Path:
    """``path`` if it is a file.

    Raises:
        UserError: it does not exist, or is a directory.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory, expected {what}", hint=f"give the path of {what}")
    if not path.is_file():
        raise not_there(path, what)
    return path


def not_there(path: Path, what: str) -> UserError:
    """The error of a ``path`` that leads nowhere, where ``what`` was expected; it names what is called almost so."""
    around = path.parent
    beside = around.iterdir() if around.is_dir() and os.access(around, os.R_OK) else ()
    stems = [other.stem for other in beside if other.suffix == path.suffix]
    close = difflib.get_close_matches(path.stem, stems, n=1)
    hint = f"did you mean {around / close[0]}{path.suffix}?" if close else "check the path"
    return UserError(f"{path} does not exist, expected {what}", hint=hint)


def inside(directory: Path, name: str, owner: Path) -> Path:
    """``directory / name``, refused when ``name`` (an untrusted entry of ``owner``) leads out of ``directory``.

    >>> inside(Path("model"), "model.onnx.data", Path("model/model.onnx")).as_posix()
    'model/model.onnx.data'
    """
    target = directory / name
    if Path(name).is_absolute() or not target.resolve().is_relative_to(directory.resolve()):
        raise UserError(
            f"{owner} names the file {name!r}, which lies outside {directory}",
            hint="a model may only name files in its own directory; get the model from a source you trust",
        )
    return target


def refuse_existing(path: Path) -> None:
    """Checked before any work starts.

    Raises:
        UserError: ``path`` exists, as nothing is ever overwritten; or no directory can be made where it is to lie.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} already exists", hint=f"give another -o, or remove it first: rm -r {path}")
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise UserError(f"{path} cannot be written: {above} is a file", hint="give another -o")
    if not os.access(above, os.W_OK):
        raise UserError(f"{path} cannot be written: you may not write to {above}", hint="give another -o")


def require_room(directory: Path, size: int) -> None:
    """Find out whether a file of ``size`` bytes can be written, for who was only told that it failed.

    Raises:
        OSError: it cannot.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        for start in range(0, size, _PIECE):
            file.write(bytes(min(_PIECE, size - start)))


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A staging directory beside ``path`` that becomes ``path`` when the block ends well, and is removed when not.

    What a killed run to ``path`` left is removed too.

    Raises:
        UserError: ``path`` exists already, or the disk cannot hold what is written.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _room_for(path), staging_directory(path) as staging:
        yield staging
        refuse_existing(path)
        try:
            staging.rename(path)
        except OSError:
            refuse_existing(path)  # another run has just written it
            raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A staging path beside ``path`` that replaces ``path`` when the block ends well, and is removed when not.

    Raises:
        UserError: the disk cannot hold what is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        with _room_for(path):
            yield staging
        staging.chmod(0o644)  # mkstemp and safetensors keep it to its owner
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"the disk of {path.parent} cannot hold {path.name}: {error.strerror}",
            hint=f"{free / 1e9:.1f} GB are free there, nothing half-written is left; give another -o, or make room",
        ) from error
