"""A quarter of the experts and a lower K cost little, https://arxiv.org/abs/2404.05089."""

import dataclasses
from collections.abc import Mapping

from benchmarks.claims.claim import Claim, Finding, Outcome, Scores
from benchmarks.claims.flops import Flops, count_flops
from benchmarks.claims.lab import Training, score
from benchmarks.markdown import table
from benchmarks.methods.subject import Subject
from benchmarks.tasks import TASKS
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Report
from models.checkpoints import load_model
from models.moe_layers import find_moe_layers, set_top_k
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from pruning.finetuning.options import Plain, Seer
from pruning.finetuning.recipe import Recipe, recipe
from pruning.inputs import tensors_of
from pruning.options import PlanOptions
from pruning.plan import make_plan

KEEP, TOP_K = 0.75, 1
POINTS, PERCENT = 1.0, 5.0
FEWER = 0.25

RECIPES: Mapping[str, Recipe] = {
    "images": dataclasses.replace(recipe("adamw"), steps=80, learning_rate=1e-3, batch_size=64),
    "code": dataclasses.replace(recipe("adamw"), steps=40, learning_rate=1e-3, batch_size=8),
}
"""How the tasks of ``benchmarks.tasks`` are learned."""


@dataclasses.dataclass(frozen=True)
class Way:
    """What is done to a model.

    Attributes:
        drop: a quarter of its experts.
        method: of the fine-tuning; K falls where its options say so.
    """

    drop: bool
    method: Plain | Seer

    def plan(self, task: Task) -> PruningPlan | None:
        """One ranking over all layers, by the soft count; no layer keeps fewer than K."""
        return (
            make_plan(Subject(task, 0).statistics, PlanOptions(KEEP, "seer-soft", scope="global"))
            if self.drop
            else None
        )

    @property
    def top_k(self) -> int | None:
        """K at the end, if it is another than before."""
        return self.method.top_k if isinstance(self.method, Seer) else None


UNPRUNED, BOTH = "fine-tuned", "a quarter dropped, K=1"
WAYS: Mapping[str, Way] = {
    UNPRUNED: Way(drop=False, method=Plain()),
    "a quarter dropped": Way(drop=True, method=Seer()),
    "K=1": Way(drop=False, method=Seer(top_k=TOP_K)),
    BOTH: Way(drop=True, method=Seer(top_k=TOP_K)),
    f"{BOTH}, no entropy": Way(drop=True, method=Seer(top_k=TOP_K, entropy_weight=0.0)),
}


def measure(seeds: int, report: Report) -> Outcome:
    """On every one of `RECIPES`."""
    findings, tables = {}, []
    for name, how in RECIPES.items():
        tasks = [TASKS[name](seed, report) for seed in range(seeds)]
        scores, flops = {}, {}
        for way, row in WAYS.items():
            report(f"SEER-MoE: {name}, {way}")
            values = [
                score(task, row.plan(task), Training(dataclasses.replace(how, seed=seed), row.method))
                for seed, task in enumerate(tasks)
            ]
            scores[way], flops[way] = Scores(tasks[0].metric, values), flops_of(tasks[0], row)
        findings[name] = judge(scores, flops)
        tables.append(f"{name}:\n\n{_table(scores, flops)}")
    return Outcome(findings, "\n\n".join(tables))


def flops_of(task: Task, way: Way) -> Flops:
    """Of one test example, before it is trained: training changes no shape."""
    model, plan = load_model(task.checkpoint), way.plan(task)
    if plan is not None:
        apply_plan(model, plan)
    if way.top_k is not None:
        for layer in find_moe_layers(model):
            set_top_k(model, layer, way.top_k)
    return count_flops(model, tensors_of(task.read(task.test).first(1).feeds, model.dtype))


def judge(scores: Mapping[str, Scores], flops: Mapping[str, Flops]) -> Finding:
    """The rule of the claim: little lost, and a quarter of the work saved."""
    ours, reference = scores[BOTH], scores[UNPRUNED]
    small = ours.worse_than(reference) <= (POINTS if ours.metric.higher_is_better else PERCENT)
    fewer = flops[BOTH].fewer_than(flops[UNPRUNED])
    return Finding(
        f"{ours.loss(reference)} worse ({ours}, unpruned {reference}), {fewer:.1%} fewer FLOPs",
        small and fewer >= FEWER,
    )


def _table(scores: Mapping[str, Scores], flops: Mapping[str, Flops]) -> str:
    reference, all_flops = scores[UNPRUNED], flops[UNPRUNED]
    rows = (
        (
            way,
            str(scores[way]),
            scores[way].loss(reference),
            f"{flops[way].total / 1e6:,.2f}",
            f"{flops[way].experts / 1e6:,.2f}",
            f"{flops[way].fewer_than(all_flops):.1%}",
        )
        for way in scores
    )
    return table(("", scores[UNPRUNED].metric.unit, "worse by", "MFLOPs", "of experts", "fewer"), rows)


CLAIM = Claim(
    paper="[Muzio et al.](https://arxiv.org/abs/2404.05089)",
    claimed="a quarter of the experts dropped and K lowered: a small loss, and about 27 % fewer FLOPs",
    rule=f"the mean is at most {POINTS:g} point of accuracy, or {PERCENT:g} % of perplexity, worse than that of the "
    f"unpruned model that was fine-tuned as long, and an example takes at least {FEWER:.0%} fewer FLOPs",
    setting=f"""The embedded V-MoE on its own task, a seed being the order of the images; and the Mixtrals of
`benchmarks.tasks` on code, a seed being that of the model too. 8 experts a layer. A quarter of the experts of all
layers together goes by soft count (`seer-soft`, scope `global`, at least K=2 a layer). Then AdamW trains with the
entropy of the routers, {RECIPES["images"].steps} steps of {RECIPES["images"].batch_size} images, or
{RECIPES["code"].steps} of {RECIPES["code"].batch_size} texts of 128 tokens, and K falls from 2 to 1 after half of
them. FLOPs are those of one test example.""",
    measure=measure,
    reason="""Each half holds somewhere. In the images' model experts are a quarter of the work, so that half of
them saves an eighth. The language models were trained from scratch for about an epoch, and a fine-tuning of 40 steps
does not make up for what a quarter of their experts knew. With K=1 a Mixtral's renormalised gate is 1, so that nothing
but the entropy trains its router; the weight of that, which could not be recovered from the paper, makes no difference
here.""",
)
