"""What transformers' own exporter makes of a checkpoint, timed beside ours on the same feeds.

A decoder becomes two graphs with a copy of the weights each, one for a prompt and one for a token more; whoever
generates text has to load both. ``python -m benchmarks.their_export REQUEST`` measures that in a process of its own.
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import onnxruntime as ort

from benchmarks.command import Usage, python
from moe_spec.decoder import PAST, complete
from moe_spec.manifest import Manifest, TensorSpec
from moe_spec.runner import LOGITS, Arrays, Feeds, Kept
from runtime.measuring.memory import Alone, measure_alone, measure_here

EXPORT = """
import contextlib, io, logging, sys, warnings, torch
from transformers.exporters import OnnxConfig, OnnxExporter
from models.checkpoints import load_model
from pathlib import Path
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)  # of names that torch.onnx does not know, and of versions
source, target, experts, fusions = sys.argv[1:]
model = load_model(Path(source))
if experts != "default":
    model.set_experts_implementation(experts)
config, exporter = OnnxConfig(dynamic=True, ort_fusions=fusions if fusions == "cpu" else None), OnnxExporter()
with contextlib.redirect_stdout(io.StringIO()):
    if model.can_generate():
        ids = torch.randint(3, 100, (2, 9))
        exported = exporter.export_for_generation(
            model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config=config
        )
    else:
        size = model.config.image_size
        images = torch.randn(2, model.config.num_channels, size, size)
        exported = exporter.export(model, {"pixel_values": images}, config=config)
exported.save_pretrained(target)
"""
"""https://huggingface.co/docs/transformers/exporters: with the cache that `generate` makes, for any lengths."""

DECODE = "decode.onnx"
_THEIRS = re.compile(r"^(?:(?:in|out)put\.)?past_key_values\.layers\.(\d+)\.(key|value)s$")


def export_theirs(checkpoint: Path, target: Path, experts: str, fusions: str) -> Usage:
    """Let transformers export ``checkpoint`` to the directory ``target``.

    Args:
        checkpoint: what is exported.
        target: it must not exist.
        experts: how transformers computes them, or ``default``.
        fusions: ``cpu`` for those that transformers has for ONNX Runtime on a CPU, or ``none``.

    Raises:
        RuntimeError: transformers cannot export it.
    """
    return python(EXPORT, checkpoint, target, experts, fusions)


class TheirSession:
    """All graphs of an export, called like ours."""

    def __init__(self, directory: Path, like: Manifest, threads: int) -> None:
        self.inputs: tuple[TensorSpec, ...] = like.inputs
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        opened = functools.partial(ort.InferenceSession, sess_options=options, providers=["CPUExecutionProvider"])
        self._graphs = {path.name: opened(path) for path in directory.glob("*.onnx")}
        self._first = next(graph for name, graph in self._graphs.items() if name != DECODE)

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by transformers' names, those asked for or all."""
        graph = self._graph(any(name.startswith(PAST) and array.size for name, array in feeds.items()))
        given = {value.name: feeds[_ours(value.name)] for value in graph.get_inputs()}
        names = outputs or [value.name for value in graph.get_outputs()]
        return dict(zip(names, graph.run(names, given), strict=True))

    def step(self, feeds: Feeds, kept: Kept | None = None) -> tuple[Arrays, Kept]:
        """A step whose cache goes on into the next one as ONNX Runtime's values, without a copy."""
        given: dict[str, Any] = complete(self.inputs, {**feeds, **(kept or {})})
        graph = self._graph(bool(kept) or any(name.startswith(PAST) and array.size for name, array in given.items()))
        values = {
            name: array if isinstance(array, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in ((value.name, given[_ours(value.name)]) for value in graph.get_inputs())
        }
        names = [value.name for value in graph.get_outputs()]
        found = dict(zip(map(_ours, names), graph.run_with_ort_values(names, values), strict=True))
        return {LOGITS: found.pop(LOGITS).numpy()}, found

    def _graph(self, decodes: bool) -> Any:
        return self._graphs[DECODE] if decodes else self._first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._graphs.clear()


def _ours(name: str) -> str:
    """What we call an input or output of theirs.

    >>> _ours("output.past_key_values.layers.3.values"), _ours("past_key_values.layers.0.keys"), _ours("logits")
    ('past_key_values.3.value', 'past_key_values.0.key', 'logits')
    """
    return _THEIRS.sub(rf"{PAST}\1.\2", name)


@dataclasses.dataclass(frozen=True)
class TheirExport:
    """A `runtime.bench.Contestant`.

    Attributes:
        name: as rows call it.
        exported: what `export_theirs` wrote.
        directory: of our export, whose inputs and vocabulary are those of the feeds.
    """

    name: str
    exported: Path
    directory: Path

    @property
    def file_bytes(self) -> int:
        """Of all graphs and their weights."""
        return sum(path.stat().st_size for path in self.exported.glob("*.onnx*"))

    def open(self, threads: int) -> TheirSession:
        """All graphs, in this process."""
        return TheirSession(self.exported, Manifest.load(self.directory), threads)

    def alone(self, leading: int, other: int, past: int, threads: int) -> Alone:
        """All graphs, in a process of their own."""
        further = {"exported": str(self.exported.resolve())}
        module = "benchmarks.their_export"
        return measure_alone(self.directory, leading, other, past, threads, module=module, **further)


def _main(request: dict[str, Any]) -> str:
    like = Manifest.load(Path(request["model"]))
    return measure_here(request, lambda: TheirSession(Path(request["exported"]), like, request["threads"]))


if __name__ == "__main__":
    sys.stdout.write(_main(json.loads(sys.argv[1])))
