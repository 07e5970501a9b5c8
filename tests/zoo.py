"""Tiny models as checkpoints and as ONNX, each made once for the whole test run, whichever worker asks first."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
from filelock import FileLock

from exporter.export import export
from exporter.tasks import task_of
from exporter.trace import to_onnx
from exporter.write import OPSET
from models.checkpoints import load_model
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.decoders import DECODERS, save_tokenizer
from tests.families.configs import tiny
from tests.foreign.foreign import Foreign
from tests.foreign.table import FOREIGN

RUNNER = OnnxRuntimeRunner(threads=1)


@dataclasses.dataclass(frozen=True)
class Zoo:
    """Makes models below ``root`` on demand."""

    root: Path

    def checkpoint(self, name: str) -> Path:
        """Checkpoint directory of the tiny model ``name``."""
        return self.once(f"{name}.checkpoint", lambda path: tiny(name).save_pretrained(path))

    def exported(self, name: str) -> Path:
        """The same, exported by us: one experts node a layer, no cache."""
        checkpoint = self.checkpoint(name)
        return self.once(f"{name}.exported", lambda path: export(checkpoint, path, RUNNER, cache=False))

    def cached(self, name: str) -> Path:
        """The decoder ``name`` of `tests.decoders`, exported with its cache, as decoders are by default."""
        checkpoint = self.decoder(name)
        return self.once(f"{name}.cached", lambda path: export(checkpoint, path, RUNNER))

    def decoder(self, name: str) -> Path:
        """Checkpoint directory of that decoder, with a tokenizer's files beside it."""
        return self.once(f"{name}.decoder", lambda path: _save_decoder(name, path))

    def batched_mm(self, name: str) -> Path:
        """The same as plain torch.onnx exports transformers' batched_mm experts: a foreign ONNX file."""
        checkpoint = self.checkpoint(name)
        return self.once(f"{name}.onnx", lambda path: _export_batched_mm(checkpoint, path))

    def foreign(self, name: str) -> Path:
        """The graph ``name`` of the table of foreign graphs."""
        entry = FOREIGN[name]
        directory = self.once(f"{name}.foreign", lambda path: _export_foreign(entry, path))
        return directory / "model.onnx"

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.root / name
        with FileLock(self.root / f"{name}.lock"):
            if not path.exists():
                make(path)
        return path


def _save_decoder(name: str, path: Path) -> None:
    DECODERS[name]().save_pretrained(path)
    save_tokenizer(path)


def _export_batched_mm(checkpoint: Path, path: Path) -> None:
    model = load_model(checkpoint)
    model.set_experts_implementation("batched_mm")
    onnx.save(to_onnx(model, task_of(type(model).__name__), OPSET), path)


def _export_foreign(entry: Foreign, directory: Path) -> None:
    staging = directory.with_suffix(".staging")
    staging.mkdir(exist_ok=True)
    entry.export(entry.make(), entry.inputs, staging / "model.onnx")
    staging.rename(directory)
