"""Which form of a MoE layer is the quickest on a CPU, by experts left and tokens, and whether ``auto`` chooses it.

    python -m benchmarks.forms > benchmarks/forms.md

With ``--quick`` it takes some ten seconds, and its numbers are worth no more than that.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.layer import Layer, save_onnx, torch_layer
from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import AS_IT_IS, Precision
from graph_passes.record.block import MoEBlock
from graph_passes.writers import WRITERS, choose_form, why_not
from moe_spec.runner import error_between
from runtime.backends import open_session
from runtime.bench import time_in_turns
from runtime.measuring.machine import describe_machine
from runtime.onnxruntime.backend import OnnxRuntimeRunner

EXPERTS, TOP_K = (1, 2, 4, 8, 32), 2
TOKENS, QUICK_TOKENS = (1, 16, 256), (1, 16)
REPEATS, QUICK_REPEATS, WARMUP = 100, 5, 3
THREADS = 1
MODEL = "model.onnx"

NODE, GROUPED, ACTIVE = "as exported", "torch grouped_mm", "FFN of width K F"
NOT_ON_A_CPU = ("trt_moe",)
ROUNDED: Mapping[str, Precision] = {"qmoe int8": Precision("int8"), "qmoe int4/32": Precision("int4", block_size=32)}
"""Forms that compute with rounded weights: quick, but something else."""

FORMS = (NODE, *(form for form in WRITERS if form not in (*NOT_ON_A_CPU, "qmoe")))
"""What is compared with what ``auto`` chooses."""

MAX_ERROR = 1e-4
GOOD_ENOUGH = 1.2

Run = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of experts and of tokens: the median time of everything, and the form that ``auto`` takes."""

    layer: Layer
    tokens: int
    median_ms: Mapping[str, float]
    auto: str

    @property
    def best(self) -> str:
        """The quickest form."""
        return min((form for form in FORMS if form in self.median_ms), key=lambda form: self.median_ms[form])

    @property
    def ratio(self) -> float:
        """How many times as long as the best form ``auto`` takes."""
        return self.median_ms[self.auto] / self.median_ms[self.best]


def measure(experts: int, tokens: Sequence[int], repeats: int) -> list[Row]:
    """A row for each number of tokens; what is compared takes turns.

    Raises:
        RuntimeError: two of them do not compute the same.
    """
    layer, rows = Layer(experts, min(TOP_K, experts)), []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        original = Path(scratch) / MODEL
        save_onnx(layer, original)
        block = read_model(original).blocks[0]
        runs = {form: stack.enter_context(_onnx(original, form, Path(scratch) / form)) for form in _forms(block)}
        runs[GROUPED] = functools.partial(_run_torch, torch_layer(layer, "grouped_mm"))
        for count in tokens:
            _check_same(runs, layer.tokens(count))
        for name, precision in ROUNDED.items():
            runs[name] = stack.enter_context(_onnx(original, "qmoe", Path(scratch) / name.replace("/", " "), precision))
        active = Path(scratch) / "active.onnx"
        save_onnx(dataclasses.replace(layer, experts=1, top_k=1, width=layer.top_k * layer.width), active)
        runs[ACTIVE] = stack.enter_context(_onnx(active, "ffn", Path(scratch) / ACTIVE))
        for count in tokens:
            bound = {name: functools.partial(run, layer.tokens(count)) for name, run in runs.items()}
            times = time_in_turns(bound, repeats=repeats, warmup=WARMUP)
            auto = choose_form(block, FORMS, tokens=count)
            rows.append(Row(layer, count, {name: float(np.median(times[name])) for name in times}, auto))
    return rows


def _forms(block: MoEBlock) -> list[str]:
    """The forms that can express the layer."""
    return [form for form in FORMS if form == NODE or why_not(block, form) is None]


@contextlib.contextmanager
def _onnx(original: Path, form: str, out: Path, precision: Precision = AS_IT_IS) -> Iterator[Run]:
    """Runs ``original`` rewritten to ``form``, which is proven, with ONNX Runtime on the CPU."""
    if form != NODE:
        optimize(original, out, OnnxRuntimeRunner(THREADS), form=form, precision=precision)
    with open_session(original if form == NODE else out, THREADS) as session:
        yield lambda hidden_TH: session.run({"hidden": hidden_TH})["out"]


def _run_torch(module: torch.nn.Module, hidden_TH: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(hidden_TH)[None])[0])


def _check_same(runs: Mapping[str, Run], hidden_TH: npt.NDArray[np.float32]) -> None:
    reference = runs[NODE](hidden_TH)
    for name, run in runs.items():
        _, error = error_between(reference, run(hidden_TH))
        if error > MAX_ERROR:
            raise RuntimeError(f"{name} differs from {NODE} by {error:.1e} at {len(hidden_TH)} tokens")


def report(rows: Sequence[Row], repeats: int, command: str) -> str:
    """The whole document."""
    layer, close = rows[0].layer, [row for row in rows if row.ratio <= GOOD_ENOUGH]
    worst = max(rows, key=lambda row: row.ratio)
    return f"""# Forms of a MoE layer on a CPU

`{command}` printed this on {describe_machine()}; one thread.

One layer, H={layer.hidden} and F={layer.width}: softmax, top-{TOP_K} (top-1 of one expert), renormalised, SwiGLU,
float32, random weights and tokens. Milliseconds a run, median of {repeats}. In each row all take turns, so that what
else the machine does hits all alike; it was shared, and small differences mean nothing. The quickest form is bold.

- *{NODE}*: our exporter's node, computed by its ONNX function. It and the forms run in ONNX Runtime.
- *{GROUPED}*: transformers' Mixtral block in torch, with its `grouped_mm` experts.
- *{ACTIVE}*: a dense FFN that does for a token what its K experts do, without a router, in ONNX Runtime.
- *qmoe*: experts rounded to 8 bits a channel, or 4 bits in blocks of 32: other results, so never `auto`'s choice.
- *auto*: what `moe-edge optimize --target onnxruntime-cpu --tokens T` takes; *auto / best* compares it with the
  quickest form that computes the same.

{_table(rows)}

*auto / best* is at most {GOOD_ENOUGH} in {len(close)} of {len(rows)} rows; its highest is {worst.ratio:.2f}, at
E'={worst.layer.experts} and T={worst.tokens}."""


def _table(rows: Sequence[Row]) -> str:
    head = ("E'", "T", *FORMS, *ROUNDED, GROUPED, ACTIVE, "auto", "auto / best")
    lines = [head, ("---:",) * len(head), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
    times = {name: f"{time:.3g}" for name, time in row.median_ms.items()}
    times[row.best] = f"**{times[row.best]}**"
    shown = (times.get(name, "-") for name in (*FORMS, *ROUNDED, GROUPED, ACTIVE))
    return (str(row.layer.experts), str(row.tokens), *shown, row.auto, f"{row.ratio:.2f}")


def main() -> None:
    """Measure and print the document; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few runs of each")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    tokens, repeats, rows = (QUICK_TOKENS, QUICK_REPEATS, []) if quick else (TOKENS, REPEATS, [])
    for experts in EXPERTS:
        print(f"{experts} experts", file=sys.stderr)
        rows += measure(experts, tokens, repeats)
    print(report(rows, repeats, f"python -m benchmarks.forms{' --quick' if quick else ''}"))


if __name__ == "__main__":
    main()
