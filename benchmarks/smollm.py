"""SmolLM2-135M with experts of three domains: perplexity before and after it is pruned for one of them.

    python -m benchmarks.smollm > benchmarks/smollm.md

The first time it fetches the weights (``pip install "moe-edge[samples]"`` reads them) and the text, and trains for
minutes; ``MOE_EDGE_CACHE`` says where that is kept. ``--quick`` tries it out on two layers, in a minute.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, MixtralConfig

from benchmarks.markdown import table
from benchmarks.methods.cells import content
from benchmarks.tasks.cache import cached, noted
from benchmarks.tasks.corpus import DOMAINS
from benchmarks.tasks.metrics import perplexity
from benchmarks.tasks.smollm import QUICK, Models, Recipe, prepare
from benchmarks.tasks.training import Report
from models.checkpoints import load_model, load_skeleton
from models.upcycle import mix
from moe_spec.dataset import load_dataset
from moe_spec.errors import UserError
from moe_spec.plan import PruningPlan
from moe_spec.record import Json
from pruning.apply import apply_plan
from pruning.calibrate import calibrate
from pruning.options import PlanOptions
from pruning.plan import make_plan
from runtime.measuring.machine import describe_machine

KEEPS = (2, 1)
REAP, FREQUENCY = CRITERIA = ("reap", "frequency")
SEEDS = range(2)
BATCH = 4
PROMPTS = {
    "novel": "The captain looked at the sea and",
    "speeches": "Our relations with foreign nations",
    "code": 'def shortest_path(G, source, target):\n    """',
}
NEW_TOKENS = 32
STATISTICS = "statistics.safetensors"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, and its perplexity on each domain."""

    name: str
    parameters: int
    perplexities: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Lab:
    """Measures; what is done is kept.

    Attributes:
        models: trained checkpoints and data.
        report: told what is measured.
    """

    models: Models
    report: Report

    def row(self, name: str, path: Path, plan: PruningPlan | None = None) -> Row:
        """Measure the checkpoint at ``path``, pruned by ``plan`` if there is one."""
        self.report(name)
        values = {domain: self.perplexity(path, domain, plan) for domain in DOMAINS}
        return Row(name, parameters(path, plan), values)

    def perplexity(self, path: Path, domain: str, plan: PruningPlan | None = None) -> float:
        """Of the same on one domain's test blocks."""

        def make(_directory: Path) -> Json:
            blocks = load_dataset(self.models.data / domain / "test.npz")
            return {"perplexity": perplexity(load(path, plan), blocks, BATCH)}

        recipe = {"model": path.name, "plan": content(plan), "data": self.models.data.name, "domain": domain}
        return noted(cached("smollm-perplexity", recipe, make), "perplexity")

    def plan(self, domain: str, keep: int, criterion: str = REAP) -> PruningPlan:
        """By what the domain's calibration blocks tell."""

        def make(directory: Path) -> Json:
            data = self.models.data / domain / "calibration.npz"
            calibrate(self.models.moe, data, directory / STATISTICS, batch_size=BATCH)
            return {}

        recipe = {"model": self.models.moe.name, "data": self.models.data.name, "domain": domain}
        statistics = cached("smollm-statistics", recipe, make) / STATISTICS
        return make_plan(statistics, PlanOptions(keep, criterion, clamp_top_k=True))

    def continuation(self, path: Path, prompt: str, plan: PruningPlan | None = None) -> str:
        """What greedy decoding makes of ``prompt``."""
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        inputs = tokenizer(prompt, return_tensors="pt")
        ids_BS = load(path, plan).generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return str(tokenizer.decode(ids_BS[0], skip_special_tokens=True))


def load(path: Path, plan: PruningPlan | None = None) -> Any:
    """A checkpoint with or without experts as it is stored, and pruned if there is a plan; in eval mode."""
    model = load_model(path, dtype=None, known=lambda _model_type: None)
    if plan is not None:
        apply_plan(model, plan)
    if model.config.model_type == MixtralConfig.model_type:
        model.set_experts_implementation("eager")
    return model


def parameters(path: Path, plan: PruningPlan | None) -> int:
    """How many the checkpoint at ``path`` has, pruned if there is a plan."""
    if plan is None:
        return int(load(path).num_parameters())
    skeleton = load_skeleton(path)
    apply_plan(skeleton, plan)
    return skeleton.num_parameters()


def dense_rows(lab: Lab) -> Iterator[Row]:
    """The model as it was, each branch on what it learned, and the mixture."""
    models = lab.models
    dense = lab.row("SmolLM2, dense", models.dense)
    own = {domain: lab.perplexity(models.branches[domain], domain) for domain in DOMAINS}
    yield from (dense, Row("the branch of the domain, dense", dense.parameters, own))
    yield lab.row(f"the MoE of {len(models.branches)} experts, K=2", models.moe)


def pruned_rows(lab: Lab) -> Iterator[Row]:
    """Pruned for each domain, by each criterion and at random, by how many experts stay."""
    moe = lab.models.moe
    for keep in KEEPS:
        for domain in DOMAINS:
            yield lab.row(f"{keep} kept for {domain}, by REAP", moe, lab.plan(domain, keep))
        own = {domain: lab.perplexity(moe, domain, lab.plan(domain, keep, FREQUENCY)) for domain in DOMAINS}
        plans = [make_plan(moe, PlanOptions(keep, "random", seed=seed, clamp_top_k=True)) for seed in SEEDS]
        rows = [lab.row(f"{keep} kept at random", moe, plan) for plan in plans]
        yield Row(f"{keep} kept for the domain, by frequency", rows[0].parameters, own)
        means = {domain: float(np.mean([row.perplexities[domain] for row in rows])) for domain in DOMAINS}
        yield dataclasses.replace(rows[0], perplexities=means)


@torch.inference_mode()
def distance_of_copies(dense: Path, data: Path) -> float:
    """How far copies of ``dense`` as experts are from it, as a share of its largest logit, in float32."""
    model = load(dense).float()
    ids = torch.from_numpy(load_dataset(data / next(iter(DOMAINS)) / "test.npz").feeds["input_ids"][:1])
    expected = model(ids).logits
    return float((mix([model] * 4, 2)(ids).logits - expected).abs().max() / expected.abs().max())


def document(recipe: Recipe, command: str, report: Report) -> str:
    """Train what is not there, measure, and say it all."""
    models = prepare(recipe, report)
    lab = Lab(models, report)
    rows = [*dense_rows(lab), *pruned_rows(lab)]
    corpus = recipe.corpus
    return f"""# SmolLM2 with experts of three domains

`{command}` printed this on {describe_machine()}; one thread.

{table(("model", "parameters", *DOMAINS), map(_cells, rows))}

Perplexity on {corpus.test_blocks} held-out blocks of {corpus.block} tokens of each domain, in bfloat16; statistics are
of {corpus.calibration_blocks} blocks of the domain. Random experts are the mean of {len(SEEDS)} seeds.
{_training(models)}
As long as all its experts are copies of the dense model's, the MoE differs from that by at most
{distance_of_copies(models.dense, models.data):.0e} of its largest logit, in float32.

In how many of the {recipe.layers} layers each expert stays:

{table(("pruned for", "by", *models.branches), _experts_that_stay(lab), left=2)}

Greedy continuations of {NEW_TOKENS} tokens:

{"".join(_continuations(lab))}"""


def _cells(row: Row) -> list[str]:
    return [row.name, f"{row.parameters / 1e6:.0f} M", *(f"{value:.1f}" for value in row.perplexities.values())]


def _training(models: Models) -> str:
    """What it took."""
    of_branches = sum(noted(models.branches[domain], "training_seconds") for domain in DOMAINS)
    of_routers = noted(models.moe, "training_seconds")
    return f"Training took one thread {of_branches:.0f} s for the branches, and {of_routers:.0f} s for the routers."


def _experts_that_stay(lab: Lab) -> Iterator[Sequence[str]]:
    for keep, domain, criterion in itertools.product(KEEPS, DOMAINS, CRITERIA):
        kept = list(itertools.chain(*(layer.keep for layer in lab.plan(domain, keep, criterion).layers)))
        counts = np.bincount(kept, minlength=len(lab.models.branches))
        yield [f"{domain}, {keep} kept", criterion, *map(str, counts)]


def _continuations(lab: Lab) -> Iterator[str]:
    """What each model makes of each domain's prompt, as a block of text."""
    models = lab.models
    for domain, prompt in PROMPTS.items():
        said = {"dense": lab.continuation(models.dense, prompt), "the MoE": lab.continuation(models.moe, prompt)}
        for keep in KEEPS:
            said[f"{keep} kept for {domain}"] = lab.continuation(models.moe, prompt, lab.plan(domain, keep))
        for name, text in said.items():
            yield f"{domain}, {name}:\n\n```text\n{text}\n```\n\n"


def main() -> None:
    """Measure and print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="on two layers that say nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = "python -m benchmarks.smollm" + (" --quick" if options.quick else "")
    try:
        print(document(QUICK if options.quick else Recipe(), command, lambda line: print(line, file=sys.stderr)))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
