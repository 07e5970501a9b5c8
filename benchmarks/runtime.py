"""What pruning buys in ONNX Runtime on a CPU, beside transformers' own export and torch, and what bounds it.

    python -m benchmarks.runtime > benchmarks/runtime.md

Models are exported into ``--models DIRECTORY`` and used again where they lie there already; by default into a temporary
one. ``--parts`` runs some of it; with ``--quick`` the decoder is small and runs are few, and its numbers say nothing.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.command import moe_edge, python
from benchmarks.export import WRITE
from benchmarks.markdown import table
from benchmarks.node_times import products_of
from benchmarks.roofline import PROBES, Probe, Speeds, Step, speeds_of, step_of
from benchmarks.tasks.smollm import QUICK as QUICK_RECIPE
from benchmarks.tasks.smollm import Recipe, prepare
from benchmarks.their_export import TheirExport, export_theirs
from cli.against import SESSIONS, InTorch
from exporter.cache import tensors_in
from exporter.tasks import task_of
from models.checkpoints import load_model, load_skeleton, stored_tensors
from models.vmoe.assets import fashion_mnist
from moe_spec.decoder import PAST
from moe_spec.manifest import Manifest
from moe_spec.runner import LOGITS, Kept, error_between
from runtime.backends import open_session
from runtime.bench import DECODE, PREFILL, BenchRow, Contestant, bench
from runtime.inputs.random_feeds import RandomFeeds
from runtime.measuring.machine import describe_machine
from runtime.measuring.pinning import pinned
from runtime.model_dir import model_file

THREADS, REPEATS, LARGE_REPEATS, QUICK_REPEATS, WARMUP = 1, 20, 8, 2, 2
LENGTH = 128
"""Tokens of a prompt, and in the cache when one more is decoded."""

DECODER = {
    "num_hidden_layers": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
}
"""A Qwen3-MoE of 46 M parameters, 183 MB: far more than the caches that a core has for itself."""
QUICK = DECODER | {"num_hidden_layers": 1, "num_experts": 8, "hidden_size": 64, "vocab_size": 512}

KEPT: Mapping[str, str | None] = {"all": None, "50%": "50%", "25%": "25%", "one a layer": "1"}
"""Experts that stay, as `--keep` takes them."""
WHOLE, PRUNED = "moe-edge, all", "moe-edge, 25%"
THEIRS = {
    f"transformers, {experts}{fused and ', fused'}": (experts, fused or "none")
    for experts in ("default", "batched_mm")
    for fused in ("", "cpu")
}
DEFAULTS = [name for name, (experts, _) in THEIRS.items() if experts == "default"]
"""Without what a user has to ask for: another implementation for each phase."""
MAX_ERROR = 1e-4
HEAD = """# What pruning buys at run time

`{command}` printed this on {machine}.

ONNX Runtime on a CPU and torch, float32, batch 1, one thread on one core, medians of runs in which all take turns on
the same feeds, so that what else the machine does hits all alike. Weights and plans that are random decide nothing here
but which experts a token goes to.

- *moe-edge*: what `export` and `optimize --target onnxruntime-cpu` write, with all experts and pruned.
- *transformers*: its own exporter, unpruned, with the experts implementation named; *fused* with the fusions that it
  has for ONNX Runtime on a CPU (`ort_fusions="cpu"`). ONNX Runtime optimises every graph with all that it has. Decoders
  are two graphs there, for prompt and step, each with a copy of the weights; ours are one.
- *torch*, *torch.compile*: the checkpoint, unpruned, experts and cache as transformers has them by default; compiled
  for each length by itself. Its load is with compiling, nothing found ready.
- *times as quick as their best*: the time of transformers' quickest export over this one's.
- *bound*: the longer of two times: its weights (of experts only those that its tokens can go to) and cache over the
  bandwidth, and its products over the peak. Both speeds were measured in turns with the models, by the same core, and
  are those of the quickest run: of a product of a matrix of 64 MiB with a vector or a copy of it, and of a product of
  square matrices in torch or in ONNX Runtime.
  What a step takes beyond it goes to nodes that compute little, each of which costs ONNX Runtime some microseconds:
  the share of its profiler is that of the pruned model, run by itself."""

PHASES = {PREFILL: f"A prompt of {LENGTH} tokens", DECODE: f"One token behind {LENGTH}", "": "One image"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A checkpoint, and what is made of it.

    Attributes:
        checkpoint: of the model.
        models: the directory for what is made.
        kept: by name, the experts that stay, as `--keep` takes them.
        ways: by name, how transformers exports it; some of `THEIRS`.
        proves: whether `optimize` is to prove what it wrote.
    """

    checkpoint: Path
    models: Path
    kept: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: KEPT)
    ways: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=lambda: THEIRS)
    proves: bool = True

    def ours(self) -> dict[str, Path]:
        """Exported, pruned, and in the form that `auto` chooses for a CPU; by name."""
        exported = self._once("exported", lambda out: moe_edge("export", self.checkpoint, "-o", out))
        names = {f"moe-edge, {name}": keep for name, keep in self.kept.items()}
        return {name: self._once(name, functools.partial(self._prune, exported, keep)) for name, keep in names.items()}

    def theirs(self, like: Path) -> list[TheirExport]:
        """What transformers exports, each way that it has."""
        made = {
            name: self._once(name, lambda out, how=how: export_theirs(self.checkpoint, out, *how))  # type: ignore[misc]
            for name, how in self.ways.items()
        }
        return [TheirExport(name, path, like) for name, path in made.items()]

    def _prune(self, exported: Path, keep: str | None, out: Path) -> None:
        plan = out.with_name(f"{out.name}.json")
        if keep is not None:
            moe_edge("plan", self.checkpoint, "--criterion", "random", "--keep", keep, "--clamp-top-k", "-o", plan)
        planned = () if keep is None else ("--plan", plan, "--clamp-top-k")
        proof = "--prove" if self.proves else "--no-prove"
        moe_edge("optimize", exported, *planned, "--target", "onnxruntime-cpu", proof, "-o", out)

    def _once(self, name: str, write: Callable[[Path], object]) -> Path:
        return once(self.models / name, write)


def once(path: Path, write: Callable[[Path], object]) -> Path:
    """``path``, which is written if it is not there; whole or not at all."""
    if not path.exists():
        print(f"making {path.name}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=path.parent) as staging:
            write(Path(staging) / path.name)
            (Path(staging) / path.name).rename(path)
    return path


def measure(subject: Subject, repeats: int) -> str:
    """Tables of one subject: times and bounds by phase, then what each model takes."""
    ours = subject.ours()
    theirs = subject.theirs(ours[WHOLE])
    in_torch = {how: InTorch(how, subject.checkpoint, ours[WHOLE]) for how in SESSIONS}
    for rival in theirs:
        check_same(ours[WHOLE], rival)
    print("timing", file=sys.stderr)
    probes = [Probe(name) for name in PROBES]
    rivals: list[Contestant] = [*theirs, *in_torch.values(), *probes]
    with pinned(THREADS):
        rows = bench(
            list(ours.values()), (1,), repeats=repeats, warmup=WARMUP, threads=THREADS, length=LENGTH, rivals=rivals
        )
    names = {str(path): name for name, path in ours.items()}
    names |= {rival.name: how for how, rival in in_torch.items()}
    named = [dataclasses.replace(row, model=names.get(row.model, row.model)) for row in rows]
    speeds = speeds_of({probe.name: min(probe.times) for probe in probes})
    kept = {name: Manifest.load(path).blocks[0].experts for name, path in ours.items()}
    timed = [row for row in named if row.model not in PROBES]
    texts = []
    for phase, step in steps(load_model(subject.checkpoint)).items():
        texts += [phase_table([row for row in timed if row.phase == phase], step, kept, speeds), _nodes(ours, phase)]
    notes = "\n".join(f"- {note}" for rival in in_torch.values() for note in rival.notes())
    return "\n\n".join([_speeds(speeds), *texts, costs(timed), notes.replace(f" {subject.checkpoint}", "")])


def check_same(export: Path, rival: TheirExport) -> None:
    """See that it is the same model.

    Raises:
        RuntimeError: its logits differ.
    """
    with open_session(export, THREADS) as mine, rival.open(THREADS) as theirs:
        our_cache: Kept = {}
        their_cache: Kept = {}
        for length, past in ((LENGTH, 0), (1, LENGTH)):
            drawn = RandomFeeds.of(mine.inputs, export).draw(1, length, seed=0, past=past)
            feeds = {name: array for name, array in drawn.items() if not name.startswith(PAST)}
            ours, our_cache = mine.step(feeds, our_cache)
            others, their_cache = theirs.step(feeds, their_cache)
            _, error = error_between(ours[LOGITS], others[LOGITS])
            if error > MAX_ERROR:
                raise RuntimeError(f"{rival.name} differs from {export} by {error:.1e}")


def _nodes(ours: Mapping[str, Path], phase: str) -> str:
    model = ours[PRUNED]
    with open_session(model, THREADS) as session:
        length, past = (1, LENGTH) if phase == DECODE else (LENGTH, 0)
        feeds = RandomFeeds.of(session.inputs, model).draw(1, length, seed=0, past=past)
    return f"By ONNX Runtime's profiler {products_of(model_file(model), feeds, THREADS)}."


def steps(model: PreTrainedModel) -> dict[str, Step]:
    """What is timed of it, by phase."""
    if not model.can_generate():
        images = task_of(type(model).__name__).example(model.config, 1, 1, np.random.default_rng(0))
        inputs = {name: torch.from_numpy(array) for name, array in images.items()}
        return {"": step_of(model, inputs, tokens=model.config.num_patches, cached=0)}
    ids = torch.zeros((1, LENGTH), dtype=torch.int64)
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    cached = sum(tensor.numel() for *_, tensor in tensors_in(cache))
    one: dict[str, Any] = {"input_ids": ids[:, :1], "past_key_values": cache}
    return {
        PREFILL: step_of(model, {"input_ids": ids}, tokens=LENGTH, cached=0),
        DECODE: step_of(model, one, tokens=1, cached=cached),
    }


def phase_table(rows: Sequence[BenchRow], step: Step, kept: Mapping[str, int], speeds: Speeds) -> str:
    """Times in one phase beside their bounds, and what they say."""
    best = min((row for row in rows if row.model in THEIRS), key=lambda row: row.median_ms)
    bounds = {row.model: step.bound(kept.get(row.model, step.experts), speeds) for row in rows}
    cells = [
        (
            row.model,
            f"{row.median_ms:.2f}",
            f"{row.p90_ms:.2f}",
            f"{best.median_ms / row.median_ms:.2f}",
            f"{bounds[row.model].ms:.2f}",
            bounds[row.model].by,
            f"{bounds[row.model].ms / row.median_ms:.0%}",
        )
        for row in rows
    ]
    pruned = next(row for row in rows if row.model == PRUNED)
    default = min((row for row in rows if row.model in DEFAULTS), key=lambda row: row.median_ms)
    bound = bounds[PRUNED]
    beside = f"""; by its default implementation of experts
{default.median_ms:.2f} ms, {default.median_ms / pruned.median_ms:.2f} times as long"""
    as_long = f"long{beside if default is not best else ''}"
    head = ("model", "p50 ms", "p90 ms", "times as quick as their best", "bound ms", "by", "reached")
    return f"""### {PHASES[rows[0].phase]}

{table(head, cells)}

With a quarter of the experts it takes {pruned.median_ms:.2f} ms, the quickest of transformers' unpruned exports
({best.model.removeprefix("transformers, ")}) {best.median_ms:.2f} ms, {best.median_ms / pruned.median_ms:.2f} times as
{as_long}. Its weights and cache are read in {bound.reading_ms:.2f} ms at the least, and its products computed in
{bound.computing_ms:.2f} ms: {bound.by} would bound it, and it reaches {bound.ms / pruned.median_ms:.0%} of that."""


def costs(rows: Sequence[BenchRow]) -> str:
    """What opening each model takes, of two phases the one that takes more."""
    by_name: dict[str, list[BenchRow]] = {}
    for row in rows:
        by_name.setdefault(row.model, []).append(row)
    cells = [
        (
            name,
            f"{max(row.load_ms for row in found):,.0f}",
            f"{max(row.memory_bytes or 0 for row in found) / (1 << 20):,.0f}",
            f"{found[0].file_bytes / 1e6:,.1f}",
        )
        for name, found in by_name.items()
    ]
    return f"""### What it takes

{table(("model", "load ms", "memory MiB", "files MB"), cells)}"""


def _speeds(speeds: Speeds) -> str:
    bandwidth, peak = speeds.bandwidth / 1e9, speeds.peak / 1e9
    return f"In turns with the models this core read {bandwidth:.1f} GB/s and did {peak:.0f} GFLOP/s at its best."


def decoder(models: Path, quick: bool) -> str:
    """A decoder with a cache."""
    sizes = QUICK if quick else DECODER
    checkpoint = once(models / "checkpoint", lambda out: python(WRITE, json.dumps(sizes), out))
    count = sum(tensor.size for tensor in stored_tensors(checkpoint).values()) / 1e6
    return f"""## A decoder

A Qwen3-MoE of {sizes["num_hidden_layers"]} layers of {sizes["num_experts"]} experts, K={sizes["num_experts_per_tok"]},
{count:.0f} M parameters, random.

{measure(Subject(checkpoint, models), QUICK_REPEATS if quick else REPEATS)}"""


def vmoe(models: Path, quick: bool) -> str:
    """The embedded model, which fits into a core's own cache."""
    return f"""## The embedded V-MoE

It was trained on Fashion-MNIST; two of its blocks have 8 experts, K=2. All of it fits into a core's own cache, which is
quicker than the memory that its bound is computed with.

{measure(Subject(fashion_mnist(), models), QUICK_REPEATS if quick else 5 * REPEATS)}"""


def smollm2(models: Path, quick: bool) -> str:
    """A pretrained model whose weights are far more than any cache."""
    recipe = QUICK_RECIPE if quick else Recipe()
    checkpoint = prepare(recipe, lambda line: print(line, file=sys.stderr)).moe
    count = load_skeleton(checkpoint).num_parameters() / 1e6
    some = {name: how for name, how in THEIRS.items() if "batched_mm" not in how}
    kept = {name: KEPT[name] for name in ("all", "50%", "25%")}
    subject = Subject(checkpoint, models, kept, some, proves=False)
    return f"""## SmolLM2 with experts

Sample 7's Mixtral: {recipe.layers} layers of 4 experts, K={recipe.top_k}, {count:.0f} M parameters. A quarter of the
experts is one a layer. Transformers' `batched_mm` is left out: above it takes many times as long.

{measure(subject, QUICK_REPEATS if quick else LARGE_REPEATS)}"""


PARTS: Mapping[str, Callable[[Path, bool], str]] = {"decoder": decoder, "vmoe": vmoe, "smollm2": smollm2}


def main() -> None:
    """Measure and print the document; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small decoder, few runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some of it")
    parser.add_argument("--models", type=Path, help="where models are kept from run to run")
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for processes of their own: this is not installed
    some = ["--parts", *asked.parts] if asked.parts != list(PARTS) else []
    command = " ".join(["python -m benchmarks.runtime", *["--quick"] * asked.quick, *some])
    print(HEAD.format(command=command, machine=describe_machine()))
    with tempfile.TemporaryDirectory() as scratch:
        for part in asked.parts:
            models = (asked.models or Path(scratch)) / (f"{part}-quick" if asked.quick else part)
            models.mkdir(parents=True, exist_ok=True)
            print(f"\n{PARTS[part](models, asked.quick)}", flush=True)


if __name__ == "__main__":
    main()
