"""SmolLM2-135M with experts of three domains: perplexity before and after it is pruned for one of them.

    python -m benchmarks.smollm > benchmarks/smollm.md

The first time it fetches the weights (``pip install "moe-edge[samples]"`` reads them) and the text, and trains for
minutes; ``MOE_EDGE_CACHE`` says where that is kept. ``--quick`` tries it out on three layers, in seconds.
"""

import argparse
import copy
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.machine import describe_machine
from benchmarks.markdown import table
from benchmarks.tasks.corpus import DOMAINS
from benchmarks.tasks.metrics import perplexity
from benchmarks.tasks.smollm import GENERAL, QUICK, Models, Recipe, prepare
from benchmarks.tasks.task import training_seconds
from benchmarks.tasks.training import Report
from models.checkpoints import load_model
from models.upcycle import mix, require_dense
from moe_spec.dataset import load_dataset
from moe_spec.errors import UserError
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from pruning.calibrate import calibrate
from pruning.plan import PlanOptions, make_plan

KEEPS = (2, 1)
SEEDS = range(2)
BATCH = 4
PROMPTS = {
    "novel": "The old whale",
    "speeches": "To the Congress of the United States:",
    "code": "def shortest_path(G, source, target):",
}
NEW_TOKENS = 32

Plans = Mapping[tuple[str, int], PruningPlan]
"""By the domain that a plan is for, and how many experts stay in each layer."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, and its perplexity on each domain."""

    name: str
    parameters: int
    perplexities: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Lab:
    """What everything is measured with.

    Attributes:
        models: trained checkpoints and data.
        moe: the model of all experts.
        report: told what is measured.
    """

    models: Models
    moe: PreTrainedModel
    report: Report

    def row(self, name: str, model: PreTrainedModel) -> Row:
        """Measure ``model``."""
        self.report(name)
        return Row(name, model.num_parameters(), {domain: self.measure(model, domain) for domain in DOMAINS})

    def measure(self, model: PreTrainedModel, domain: str) -> float:
        """Perplexity on the test blocks."""
        return perplexity(model, load_dataset(self.models.data / domain / "test.npz"), BATCH)

    def pruned(self, plan: PruningPlan) -> PreTrainedModel:
        """A copy of the model without what ``plan`` drops."""
        model = copy.deepcopy(self.moe)
        apply_plan(model, plan)
        return model

    def statistics(self, directory: Path, domain: str) -> Path:
        """Of the calibration blocks."""
        out = directory / f"{domain}.safetensors"
        calibrate(self.models.moe, self.models.data / domain / "calibration.npz", out, batch_size=BATCH)
        return out

    def continuation(self, model: Any, prompt: str) -> str:
        """What greedy decoding makes of ``prompt``."""
        tokenizer = AutoTokenizer.from_pretrained(self.models.moe, local_files_only=True)
        inputs = tokenizer(prompt, return_tensors="pt")
        ids_BS = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return str(tokenizer.decode(ids_BS[0], skip_special_tokens=True))


def dense_rows(lab: Lab) -> Iterator[Row]:
    """The model as it was, each branch on what it learned, and the mixture."""
    branches = {name: load_dense(path) for name, path in lab.models.branches.items()}
    yield lab.row("SmolLM2, dense", branches[GENERAL])
    own = {domain: lab.measure(branches[domain], domain) for domain in DOMAINS}
    yield Row("its branch for the domain, dense", branches[GENERAL].num_parameters(), own)
    yield lab.row(f"the MoE of {len(branches)} experts, K=2", lab.moe)


def pruned_rows(lab: Lab, plans: Plans) -> Iterator[Row]:
    """Pruned for each domain, and at random, by how many experts stay."""
    for keep in KEEPS:
        for domain in DOMAINS:
            plan = plans[domain, keep]
            yield lab.row(f"{keep} kept for {domain}", lab.pruned(plan))
        options = [PlanOptions(keep, "random", seed=seed, clamp_top_k=True) for seed in SEEDS]
        rows = [lab.row(f"{keep} kept at random", lab.pruned(make_plan(lab.models.moe, one))) for one in options]
        means = {domain: float(np.mean([row.perplexities[domain] for row in rows])) for domain in DOMAINS}
        yield dataclasses.replace(rows[0], perplexities=means)


@torch.inference_mode()
def distance_of_copies(dense: Path, data: Path) -> float:
    """How far copies of ``dense`` as experts are from it, as a share of its largest logit, in float32."""
    model = load_dense(dense, torch.float32)
    ids = torch.from_numpy(load_dataset(data / next(iter(DOMAINS)) / "test.npz").feeds["input_ids"][:1])
    expected = model(ids).logits
    return float((mix([model] * 4, 2)(ids).logits - expected).abs().max() / expected.abs().max())


def load_dense(path: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """In eval mode; as it is stored if there is no ``dtype``."""
    return load_model(path, dtype, require_dense)


def document(recipe: Recipe, command: str, report: Report) -> str:
    """Train what is not there, measure, and say it all."""
    models = prepare(recipe, report)
    moe = load_model(models.moe, dtype=None)
    moe.set_experts_implementation("eager")
    lab = Lab(models, moe, report)
    with tempfile.TemporaryDirectory() as scratch:
        statistics = {domain: lab.statistics(Path(scratch), domain) for domain in DOMAINS}
        plans = {
            (domain, keep): make_plan(statistics[domain], PlanOptions(keep, "reap", clamp_top_k=True))
            for domain, keep in itertools.product(DOMAINS, KEEPS)
        }
    rows = [*dense_rows(lab), *pruned_rows(lab, plans)]
    texts = "\n".join(_continuations(lab, plans))
    distance = distance_of_copies(models.dense, models.data)
    corpus = recipe.corpus
    return f"""# SmolLM2 with experts of three domains

`{command}` printed this on {describe_machine()}; one thread.

{table(("model", "parameters", *DOMAINS), map(_cells, rows))}

Perplexity on {corpus.test_blocks} held-out blocks of {corpus.block} tokens of each domain, in bfloat16; statistics are
of {corpus.calibration_blocks} blocks of the domain. Random experts are the mean of {len(SEEDS)} seeds.
{_training(models)}
As long as all its experts are copies of the dense model's, the MoE differs from that by at most {distance:.0e} of its
largest logit, in float32.

In how many of the {recipe.layers} layers each expert stays:

{table(("pruned for", *models.branches), _experts_that_stay(plans, tuple(models.branches)))}

Greedy continuations of {NEW_TOKENS} tokens:

{texts}"""


def _training(models: Models) -> str:
    """What it took."""
    of_branches = sum(training_seconds(models.branches[domain]) for domain in DOMAINS)
    of_routers = training_seconds(models.moe)
    return f"Training took one thread {of_branches:.0f} s for the branches, and {of_routers:.0f} s for the routers."


def _experts_that_stay(plans: Plans, names: Sequence[str]) -> Iterator[Sequence[str]]:
    for (domain, keep), plan in plans.items():
        kept = list(itertools.chain(*(layer.keep for layer in plan.layers)))
        yield [f"{domain}, {keep} kept", *map(str, np.bincount(kept, minlength=len(names)))]


def _continuations(lab: Lab, plans: Plans) -> Iterator[str]:
    """What each model makes of each domain's prompt, as a block of text."""
    for domain, prompt in PROMPTS.items():
        models = {"dense": load_dense(lab.models.dense), "all experts": lab.moe}
        models |= {f"{keep} kept for {domain}": lab.pruned(plans[domain, keep]) for keep in KEEPS}
        for name, model in models.items():
            yield f"{domain}, {name}:\n\n```text\n{lab.continuation(model, prompt)}\n```\n"


def _cells(row: Row) -> list[str]:
    return [row.name, f"{row.parameters / 1e6:.0f} M", *(f"{value:.1f}" for value in row.perplexities.values())]


def main() -> None:
    """Measure and print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="on three layers that say nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = "python -m benchmarks.smollm" + (" --quick" if options.quick else "")
    try:
        print(document(QUICK if options.quick else Recipe(), command, lambda line: print(line, file=sys.stderr)))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
