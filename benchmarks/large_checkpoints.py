"""What calibrating and pruning a checkpoint costs that memory may not hold: OLMoE-1B-7B's shape, random weights.

    python -m benchmarks.large_checkpoints > benchmarks/large_checkpoints.md

It writes checkpoints of up to 13.8 GB below the temporary directory (``TMPDIR``), twice as much for a while, and
removes them. With ``--quick`` they are small, and its numbers say nothing about large ones.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.command import Usage, moe_edge
from models.tensor_files import Span, StoredTensor, write_tensors
from runtime.measuring.machine import describe_machine

Array = npt.NDArray[Any]

KEPT = "50%"
MEMORY = "4GB"
"""What calibration may fill with weights; in float32 the whole model has 28 GB of them."""
EXAMPLES, TOKENS = 4, 128
BFLOAT16_BYTES = 2
BLOCK_BYTES = 1 << 24
MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """An OLMoE (https://arxiv.org/abs/2409.02060), in ``moe_spec``'s words."""

    layers: int
    experts: int = 64
    top_k: int = 8
    hidden: int = 2048
    width: int = 1024
    heads: int = 16
    vocabulary: int = 50304

    @property
    def config(self) -> dict[str, object]:
        """What config.json says."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its name in published checkpoints."""
        H, F = self.hidden, self.width
        expert = {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}
        layer = {
            "input_layernorm": (H,),
            "post_attention_layernorm": (H,),
            **{f"self_attn.{name}": (H, H) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            **{f"self_attn.{name}": (H,) for name in ("q_norm", "k_norm")},
            "mlp.gate": (self.experts, H),
            **{f"mlp.experts.{e}.{name}": shape for e in range(self.experts) for name, shape in expert.items()},
        }
        layers = {
            f"model.layers.{number}.{name}": shape for number in range(self.layers) for name, shape in layer.items()
        }
        ends = {"model.embed_tokens": (self.vocabulary, H), "model.norm": (H,), "lm_head": (self.vocabulary, H)}
        return {f"{name}.weight": shape for name, shape in (layers | ends).items()}


SHAPES = (Shape(layers=2), Shape(layers=4), Shape(layers=16))
QUICK_SHAPES = tuple(
    Shape(layers, experts=8, top_k=2, hidden=64, width=32, heads=4, vocabulary=512) for layers in (1, 2)
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One checkpoint: calibrated, planned, pruned, and what is kept of it copied."""

    layers: int
    bytes_before: int
    bytes_after: int
    calibrate: Usage
    plan: Usage
    prune: Usage
    cp_seconds: float


def save_large(shape: Shape, directory: Path) -> None:
    """Write a bfloat16 checkpoint whose matrices repeat one random block; what is normalised is scaled by 1."""
    scale = np.float32(1 / np.sqrt(shape.hidden))
    block = np.random.default_rng(0).standard_normal(BLOCK_BYTES // BFLOAT16_BYTES, dtype=np.float32) * scale
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        random, ones = Path(scratch) / "random", Path(scratch) / "ones"
        _as_bfloat16(block).tofile(random)
        _as_bfloat16(np.ones(shape.hidden, np.float32)).tofile(ones)
        stored = {name: _repeated(ones if len(axes) == 1 else random, axes) for name, axes in shape.tensors.items()}
        directory.mkdir()
        write_tensors(stored, directory)
    (directory / "config.json").write_text(json.dumps(shape.config, indent=2))


def _as_bfloat16(values: Array) -> Array:
    """The upper halves of float32 values."""
    return values.astype("<f4").view("<u2")[1::2]


def _repeated(source: Path, shape: tuple[int, ...]) -> StoredTensor:
    """A bfloat16 tensor of the bytes of ``source``, again and again."""
    left, length = BFLOAT16_BYTES * int(np.prod(shape)), source.stat().st_size
    spans = [Span(source, 0, length)] * (left // length) + [Span(source, 0, left % length)]
    return StoredTensor("BF16", shape, tuple(spans))


def measure(shape: Shape) -> Row:
    """Half of the experts of each layer deleted, by what they did; then what is left copied by ``cp``."""
    with tempfile.TemporaryDirectory() as scratch:
        names = ("model", "data.npz", "statistics.safetensors", "plan.json", "out", "copy")
        source, data, statistics, plan, out, copy = (Path(scratch) / name for name in names)
        save_large(shape, source)
        np.savez(data, input_ids=np.random.default_rng(0).integers(0, shape.vocabulary, (EXAMPLES, TOKENS)))
        os.sync()
        spread = ("--device-map", "auto", "--max-memory", MEMORY)
        calibrated = moe_edge("calibrate", source, "--data", data, *spread, "-o", statistics)
        planned = moe_edge("plan", statistics, "--keep", KEPT, "-o", plan)
        pruned = moe_edge("prune", source, "--plan", plan, "-o", out)
        before, after = _bytes(source), _bytes(out)
        shutil.rmtree(source)  # disks are small
        started = time.perf_counter()
        subprocess.run(["cp", "-r", out, copy], check=True)
        os.sync()
        return Row(shape.layers, before, after, calibrated, planned, pruned, time.perf_counter() - started)


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def report(rows: Sequence[Row], command: str) -> str:
    """The whole document."""
    small, large = rows[0], rows[-1]
    bytes_more = (large.bytes_before - small.bytes_before) / 1e9
    calibrate_more, prune_more = (
        (more.peak_bytes - less.peak_bytes) / MEGABYTE
        for more, less in ((large.calibrate, small.calibrate), (large.prune, small.prune))
    )
    return f"""# What calibrating and pruning a large checkpoint costs

`{command}` printed this on {describe_machine()}.

OLMoE-1B-7B's shape with random weights in bfloat16: 16 layers are the whole model, fewer are beside it to show what
grows. Three processes of their own, until what they wrote was on disk; peak memory is that of the whole process.

- `calibrate --device-map auto --max-memory {MEMORY}` on {EXAMPLES} x {TOKENS} random tokens, one batch, in float32.
  Weights that do not fit are read from the checkpoint where they are needed, and nothing but the statistics is
  written. It hashes the model too.
- `plan --keep {KEPT}` from those statistics, by REAP. It reads no model.
- `prune` hashes the model, copies what is kept, and hashes what it wrote. torch and transformers take most of its
  memory before a weight is touched. `cp` copies the kept bytes, and hashes nothing.

One run each, one after the other, on a machine that does other things too.

{_table(rows)}

From first to last the model grows by {bytes_more:.1f} GB, the peak memory of `calibrate` by {calibrate_more:.0f} MB,
that of `prune` by {prune_more:.0f} MB."""


def _table(rows: Sequence[Row]) -> str:
    steps = ("calibrate", "plan", "prune")
    titles = (
        "layers",
        "model",
        "kept",
        *(f"{step}{what}" for step in steps for what in ("", ", peak")),
        "cp of the kept",
    )
    lines = [titles, ("---:",) * len(titles)]
    for row in rows:
        sizes = (f"{row.bytes_before / 1e9:.2f} GB", f"{row.bytes_after / 1e9:.2f} GB")
        usages = (row.calibrate, row.plan, row.prune)
        costs = [(f"{usage.seconds:.1f} s", f"{usage.peak_bytes / MEGABYTE:,.0f} MB") for usage in usages]
        lines.append((str(row.layers), *sizes, *itertools.chain(*costs), f"{row.cp_seconds:.1f} s"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Measure and print the document; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small checkpoints")
    quick = parser.parse_args().quick
    rows = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        print(f"{shape.layers} layers", file=sys.stderr)
        rows.append(measure(shape))
    print(report(rows, f"python -m benchmarks.large_checkpoints{' --quick' if quick else ''}"))


if __name__ == "__main__":
    main()
