"""The identity of a model: one hash that a plan, statistics and manifests agree on."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import inside, not_there, sha256_files, sha256_text
from moe_spec.manifest import MODEL
from moe_spec.progress import Progress, silent

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def checkpoint_sha256(directory: Path, on_progress: Progress = silent) -> str:
    """Hash over config.json and every safetensors file of a transformers checkpoint.

    ``on_progress`` is told of their bytes.

    Raises:
        UserError: the directory is no checkpoint, or its weights are pickled.
    """
    weights = [path.name for path in checkpoint_weights(directory)]
    return _hash_of(directory, ["config.json", *weights], on_progress)


def checkpoint_weights(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by name.

    Raises:
        UserError: the directory does not exist, has no config.json, no weights, or pickled ones.
    """
    if not directory.exists():
        raise not_there(directory, "a checkpoint directory")
    if not directory.is_dir():
        raise UserError(
            f"{directory} is a file, expected a checkpoint directory",
            hint="give a directory with config.json and *.safetensors",
        )
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} is no checkpoint: it has no config.json",
            hint="give a directory in transformers' layout: config.json and *.safetensors",
        )
    weights = sorted(directory.glob("*.safetensors"))
    if weights:
        return weights
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory} holds pickled weights ({', '.join(pickles)}), which can run code when they are read",
            hint="convert them where you trust them: model.save_pretrained(DIR) writes safetensors",
        )
    raise UserError(f"{directory} holds no *.safetensors", hint="give a checkpoint with safetensors weights")


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is the directory of a checkpoint, by its looks, rather than of a graph."""
    return (path / "config.json").is_file() and not (path / MODEL).exists() and any(path.glob("*.safetensors"))


def is_onnx(path: Path) -> bool:
    """Whether ``path`` stands for an ONNX model, by its looks: an .onnx file or a directory with model.onnx."""
    return path.suffix == ".onnx" or (path / MODEL).is_file()


def onnx_sha256(model: Path, locations: Iterable[str] = ()) -> str:
    """Hash of an ONNX file and of its weights: ``<file>.data`` and the files that it names, ``locations``.

    A file that is not there is left out; who reads its weights refuses that.

    Raises:
        UserError: a location leads out of the directory.
    """
    names = {f"{model.name}.data", *(Path(location).as_posix() for location in locations)} - {model.name}
    there = [name for name in sorted(names) if inside(model.parent, name, model).is_file()]
    return _hash_of(model.parent, [model.name, *there])


def pruned_sha256(source_sha256: str, keeps: Mapping[str, Sequence[int]]) -> str:
    """Identity of what is left of a model: in whatever form, the same experts of the same model are the same.

    A plan says ids of the model that it was made for, so it must not be taken for one with other experts.

    Args:
        source_sha256: identity of the model with all experts.
        keeps: for each MoE layer the ids that are left, ascending.

    >>> one, other = ({"layers.0.mlp": keep} for keep in [(0, 1), (2, 3)])
    >>> pruned_sha256("source", one) == pruned_sha256("source", other)
    False
    """
    lines = [f"{name} {','.join(map(str, keep))}" for name, keep in sorted(keeps.items())]
    return sha256_text("\n".join([source_sha256, *lines]))


def _hash_of(directory: Path, names: Sequence[str], on_progress: Progress = silent) -> str:
    digests = sha256_files([directory / name for name in names], on_progress)
    return sha256_text("\n".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True)))
