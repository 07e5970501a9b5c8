"""What exporting costs: a checkpoint larger than memory, many experts, many layers, and transformers' own exporter.

    python -m benchmarks.export > benchmarks/export.md

It writes a checkpoint of 13.8 GB below the temporary directory (``TMPDIR``), twice as much more for a while, and
removes them. ``--parts`` runs some of it, ``--layers`` makes that checkpoint smaller; with ``--quick`` models are
small, and its numbers say nothing about large ones.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.command import Usage, moe_edge, python
from benchmarks.large_checkpoints import Shape, save_large
from benchmarks.markdown import table
from models.tensor_files import read_tensors
from runtime.measuring.machine import describe_machine

MEGABYTE = 1 << 20
UNCHECKED = ("--max-memory", "0MB")
"""Only the export is timed, not the check against torch."""

LAYERS = 16
"""Of the whole OLMoE-1B-7B."""

DEEP = Shape(layers=48, experts=128, hidden=256, width=128, heads=4, vocabulary=1024)
MANY = tuple(Shape(layers=2, experts=E, hidden=256, width=128, heads=4, vocabulary=1024) for E in (8, 32, 128))
MIDDLE = {
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
}
"""A Qwen3-MoE that transformers' exporter can hold."""

SMALL = MIDDLE | {"num_hidden_layers": 1, "num_experts": 8, "hidden_size": 64, "vocab_size": 512}
QUICK = Shape(layers=1, experts=8, top_k=2, hidden=64, width=32, heads=4, vocabulary=512)

WRITE = """
import json, sys
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
Qwen3MoeForCausalLM(Qwen3MoeConfig.from_dict(json.loads(sys.argv[1]))).save_pretrained(sys.argv[2])
"""
"""In a process of its own: this one stays small, as its peak is where those that it starts begin."""

TRANSFORMERS = """
import sys, warnings, torch, onnx_ir
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter
warnings.simplefilter("ignore")
source, target, experts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
if experts != "default":
    model.set_experts_implementation(experts)
model.config.use_cache = False
ids = torch.arange(10).reshape(2, 5)
program = OnnxExporter().export(
    model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config=OnnxConfig(dynamic=True)
).program
onnx_ir.save(program, target, external_data="model.onnx.data")
"""
"""transformers' own exporter: https://huggingface.co/docs/transformers/exporters."""

Row = tuple[str, ...]


def large(quick: bool, layers: int) -> str:
    """OLMoE-1B-7B, a quarter of its experts kept and all, beside ``cp`` of what was written."""
    shape = QUICK if quick else Shape(layers=layers)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source, plan, out, copy = (Path(scratch) / name for name in ("model", "plan.json", "out", "copy"))
        save_large(shape, source)
        moe_edge("plan", source, "--criterion", "random", "--keep", "25%", "-o", plan)
        os.sync()
        for kept, options in (("25%", ("--plan", plan)), ("all", ())):
            used = moe_edge("export", source, *options, "--dtype", "bf16", *UNCHECKED, "-o", out)
            size = _bytes(out)
            if kept == "all":
                shutil.rmtree(source)  # disks are small
            started = time.perf_counter()
            subprocess.run(["cp", "-r", out, copy], check=True)
            os.sync()
            copied = time.perf_counter() - started
            rows.append((kept, f"{size / 1e9:.2f} GB", *_cells(used), f"{copied:.1f} s"))
            for directory in (out, copy):
                shutil.rmtree(directory)
    return f"""## Larger than memory

{_named(shape)}
in bfloat16, `export --dtype bf16`, with its cache. It hashes the model, traces it, reads what is kept and writes it;
`cp` copies what was written, and hashes nothing.

{table(("experts kept", "written", *COSTS, "cp of it"), rows)}"""


def others(quick: bool, _: int) -> str:
    """A Qwen3-MoE, written by torch, beside transformers' exporter."""
    rows: list[Row] = []
    sizes = SMALL if quick else MIDDLE
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        python(WRITE, json.dumps(sizes), source)
        parameters = sum(tensor.size for tensor in read_tensors(source / "model.safetensors").values())
        ours = moe_edge("export", source, "--no-cache", *UNCHECKED, "-o", Path(scratch) / "out")
        rows.append(("moe-edge export", _nodes(Path(scratch) / "out" / "model.onnx"), *_cells(ours), ""))
        for implementation in ("default", "batched_mm"):
            target = Path(scratch) / implementation / "model.onnx"
            target.parent.mkdir()
            used = python(TRANSFORMERS, source, target, implementation)
            ratio = f"{used.seconds / ours.seconds:.1f} x, {used.peak_bytes / ours.peak_bytes:.1f} x"
            rows.append((f"transformers, {implementation}", _nodes(target), *_cells(used), ratio))
    return f"""## Beside transformers' own exporter

A Qwen3-MoE of {sizes["num_hidden_layers"]} layers of {sizes["num_experts"]} experts,
{parameters / 1e6:,.0f} M parameters, random, in float32, without a cache; `OnnxExporter` with the experts
implementation named. At the right: wall time and peak memory over ours.

{table(("exporter", "nodes", *COSTS, "over ours"), rows)}"""


def experts(quick: bool, _: int) -> str:
    """The same model with more and more experts."""
    rows = [_one(shape) for shape in ((QUICK,) if quick else MANY)]
    return f"""## By the number of experts

Two layers of width 256 in float32, whose weights are small: what is left is the trace.

{table(("layers", "experts", "nodes", *COSTS), rows, left=0)}"""


def depth(quick: bool, _: int) -> str:
    """Many layers of many experts."""
    rows = [_one(QUICK if quick else DEEP)]
    return f"""## Many layers

{table(("layers", "experts", "nodes", *COSTS), rows, left=0)}"""


PARTS: Mapping[str, Callable[[bool, int], str]] = {"large": large, "others": others, "experts": experts, "depth": depth}
COSTS = ("wall time", "CPU time", "peak memory")


def _one(shape: Shape) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "model", Path(scratch) / "out"
        save_large(shape, source)
        used = moe_edge("export", source, *UNCHECKED, "-o", out)
        return (str(shape.layers), str(shape.experts), _nodes(out / "model.onnx"), *_cells(used))


def _cells(used: Usage) -> Row:
    return (f"{used.seconds:.1f} s", f"{used.cpu_seconds:.1f} s", f"{used.peak_bytes / MEGABYTE:,.0f} MB")


def _named(shape: Shape) -> str:
    values = sum(_count(axes) for axes in shape.tensors.values())
    return f"An OLMoE of {shape.layers} layers of {shape.experts} experts, {values / 1e6:,.0f} M parameters, random,"


def _count(axes: Sequence[int]) -> int:
    return axes[0] * _count(axes[1:]) if axes else 1


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _nodes(path: Path) -> str:
    code = "import onnx, sys; print(len(onnx.load(sys.argv[1], load_external_data=False).graph.node))"
    found = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    return f"{int(found.stdout):,}"


def main() -> None:
    """Measure and print the document; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some of it")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the large checkpoint")
    asked = parser.parse_args()
    print(f"""# What exporting costs

`python -m benchmarks.export{" ".join(["", *sys.argv[1:]])}` printed this on {describe_machine()}.

Each export is a process of its own, timed until what it wrote was on disk; peak memory is that of the whole process,
of which Python, torch and transformers take half a gigabyte before a weight is read. The check against torch is left
out (`--max-memory 0MB`). One run each, one after the other, on a machine that does other things too: CPU time is what
a free machine would need.""")
    for part in asked.parts:
        print(part, file=sys.stderr)
        print(f"\n{PARTS[part](asked.quick, asked.layers)}", flush=True)


if __name__ == "__main__":
    main()
