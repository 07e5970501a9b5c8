"""What it costs to gather statistics: a plain forward pass, the same observed, and every expert on every token.

    python -m benchmarks.calibration > benchmarks/calibration.md

It takes some minutes. With ``--quick`` it takes seconds, and its numbers are worth no more than that.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralModel, PreTrainedModel

from pruning.collect import collect
from runtime.bench import time_in_turns
from runtime.measuring.machine import describe_machine

EXAMPLES, REPEATS, QUICK_REPEATS, WARMUP, THREADS = 4, 5, 1, 1, 1
PLAIN = ("eager", "grouped_mm")
OBSERVED, DENSE = "observed", "dense"
GOOD_ENOUGH = 1.3


@dataclasses.dataclass(frozen=True)
class Size:
    """A Mixtral with random weights, and how many tokens go through it in one pass."""

    experts: int
    top_k: int
    width: int
    hidden: int = 512
    layers: int = 4
    tokens: int = 1024

    def model(self) -> PreTrainedModel:
        """The decoder without a head, which calibration does not run either."""
        config = MixtralConfig(
            vocab_size=1000,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
        )
        torch.manual_seed(0)
        model: PreTrainedModel = MixtralModel(config)
        torch.nn.Module.eval(model)
        return model

    def batch(self) -> dict[str, Tensor]:
        """Random ids without padding."""
        ids_BS = torch.randint(1000, (EXAMPLES, self.tokens // EXAMPLES), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}


SIZES = (Size(16, 2, 1024), Size(32, 8, 512), Size(64, 8, 256))
"""Few wide experts, and more and more narrow ones, which have more outputs to sum for as much computation."""

QUICK_SIZES = (Size(4, 2, 128, hidden=64, layers=1, tokens=64),)


@dataclasses.dataclass(frozen=True)
class Row:
    """The median milliseconds of everything, of the processor."""

    size: Size
    median_ms: Mapping[str, float]

    @property
    def plain(self) -> str:
        """The quicker plain forward pass."""
        return min(PLAIN, key=lambda name: self.median_ms[name])

    def ratio(self, name: str) -> float:
        """How many times as long as the quicker plain forward pass."""
        return self.median_ms[name] / self.median_ms[self.plain]


def measure(size: Size, repeats: int) -> Row:
    """A row of the table; what is compared takes turns."""
    model, batch = size.model(), size.batch()
    runs: dict[str, Callable[[], object]] = {name: functools.partial(_forward, model, batch, name) for name in PLAIN}
    runs[OBSERVED] = functools.partial(collect, model, [batch])
    runs[DENSE] = functools.partial(collect, model, [batch], dense=True)
    times = time_in_turns(runs, repeats=repeats, warmup=WARMUP, clock=time.process_time_ns)
    return Row(size, {name: float(np.median(times[name])) for name in runs})


def _forward(model: PreTrainedModel, batch: Mapping[str, Tensor], experts: str) -> None:
    model.set_experts_implementation(experts)
    with torch.no_grad():
        model(**batch, use_cache=False)


def report(rows: Sequence[Row], repeats: int, command: str) -> str:
    """The whole document."""
    size, worst = rows[0].size, max(row.ratio(OBSERVED) for row in rows)
    return f"""# What it costs to gather statistics

`{command}` printed this on {describe_machine()}; one thread.

A Mixtral of {size.layers} layers with H={size.hidden} and random weights, float32; {size.tokens:,} random tokens.
Milliseconds of the processor a pass, median of {repeats}: the machine was shared, and of wall time others took most. In
each row all take turns, so that caches shared with others hit all alike; small differences mean nothing.

- *{PLAIN[0]}*, *{PLAIN[1]}*: the forward pass without a head, with transformers' two ways to run the selected experts.
- *{OBSERVED}*: `collect`, every statistic that the selected experts and the router tell, in float64.
- *{DENSE}*: `collect(dense=True)`, which also runs every expert on every token; REAP's reference always does that.
- *times plain*: against the quicker of the plain passes.

{_table(rows)}

Observing takes at most {worst:.2f} times the plain pass (aim: below {GOOD_ENOUGH:g})."""


def _table(rows: Sequence[Row]) -> str:
    head = ("E", "K", "F", *PLAIN, OBSERVED, DENSE, "observed, times plain", "dense, times plain")
    lines = [head, ("---:",) * len(head), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
    times = (f"{row.median_ms[name]:,.0f}" for name in (*PLAIN, OBSERVED, DENSE))
    ratios = (f"{row.ratio(OBSERVED):.2f}", f"{row.ratio(DENSE):.1f}")
    return (str(row.size.experts), str(row.size.top_k), str(row.size.width), *times, *ratios)


def main() -> None:
    """Measure and print the document; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, once")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    rows, repeats = [], QUICK_REPEATS if quick else REPEATS
    for size in QUICK_SIZES if quick else SIZES:
        print(size, file=sys.stderr)
        rows.append(measure(size, repeats))
    print(report(rows, repeats, f"python -m benchmarks.calibration{' --quick' if quick else ''}"))


if __name__ == "__main__":
    main()
