"""What works for which family, proven on a tiny random model of each: `models.support` reads the table.

    python -m benchmarks.families [FAMILY ...] > benchmarks/families.md

It writes the rows of these families, or of all, into models/support.json, and prints the whole table; all take a
quarter of an hour. With ``--keep DIR`` checkpoints and exports stay there, and are taken from there the next time.
With ``--stages`` only these are tried; of the rest the table says what it said before.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks import markdown
from exporter.export import export
from exporter.tasks import task_of
from exporter.trace import run_torch
from graph_passes.describe import inspect_model
from graph_passes.optimize import optimize
from models import support
from models.checkpoints import load_model, save_model
from models.families import FAMILIES, family
from models.moe_layers import find_moe_layers
from models.support import STAGES, Support
from moe_spec.dataset import MASK
from moe_spec.decoder import IDS, as_past, complete
from moe_spec.errors import UserError, VerificationError
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from moe_spec.runner import Arrays, Feeds, error_between
from pruning.collect import collect
from pruning.prune import prune
from runtime.backend import BuildOptions
from runtime.build import build
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from runtime.targets import find_target
from tests.families.configs import tiny
from tests.models_table import EXPERTS, HIDDEN, TOP_K, VOCABULARY, example_inputs
from tests.oracle import masked

KEEP = (0, 2, 5, 7)
"""Of eight experts, in every layer; two of each where there are two groups."""

BATCH, SEQUENCE = 3, 7
STEPS = (5, 1, 4)
"""Tokens of three calls, which the cache connects."""
MAX_ERROR = 1e-5
"""Of the outputs, relative to the largest."""

TARGET, FORM = "rtx-ada", "dense"
RUNNER = OnnxRuntimeRunner(threads=1)
TOOLS = ("onnx", "tensorrt-rtx", "torch", "transformers")

UNKNOWN: Mapping[str, str] = {
    "diffusion_gemma": "denoises blocks of text: its decoder takes a canvas beside ids, and an encoder has experts too",
    "doge": "an expert is one row of two embeddings, found by product keys: there is no FFN to drop",
    "inkling_mm_model": "its router has rows for shared experts too: weights of these and of the selected sum to one",
    "longcat_flash": "its router has rows that lead to no expert, but give back the input (zero_expert_num)",
    "nemo_speechlm": "takes speech; its language model is a nemotron_h",
    "nllb-moe": "transformers 5.23 sends every token to the experts 0 and 1, whatever the router says",
    "vitpose_backbone": "no router: the data set that an image is from chooses the expert",
    "zaya": "its router is an MLP that reads the one before it, and has a row for tokens that skip all experts",
}
"""What else transformers has with experts, and why it is no family here."""


NOT_TRIED = "not tried"


class UnprovenError(Exception):
    """A stage ended without an error, and with another result than it should."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One family at work.

    Attributes:
        model_type: of the family.
        kept: directory of the tiny model's checkpoint, and of that as ONNX, nothing pruned.
        root: directory of everything else.
    """

    model_type: str
    kept: Path
    root: Path

    @property
    def checkpoint(self) -> Path:
        """Made once."""
        return self.kept / "checkpoint"

    @property
    def exported(self) -> Path:
        """Made once, which takes the longest of all."""
        return self.kept / "exported"

    def plan(self) -> PruningPlan:
        """Keeps `KEEP` in every layer."""
        layers = find_moe_layers(load_model(self.checkpoint))
        plans = [LayerPlan(layer.name, layer.num_experts, layer.top_k, KEEP, groups=layer.groups) for layer in layers]
        return PruningPlan(checkpoint_sha256(self.checkpoint), "by hand", tuple(plans))

    def feeds(self) -> Feeds:
        """Inputs that were not traced."""
        inputs = example_inputs(load_model(self.checkpoint), BATCH, SEQUENCE, seed=1)
        return {name: value.numpy() for name, value in inputs.items()}

    def require_pruned(self, got: Arrays) -> None:
        """Compare with the original whose dropped experts are unselectable.

        Raises:
            UnprovenError: it gives something else.
        """
        model = load_model(self.checkpoint)
        with masked(model, self.plan()):
            expected = outputs_of(model, self.feeds())
        for name, array in expected.items():
            _, error = error_between(array, got[name])
            if not (np.isfinite(array).all() and error <= MAX_ERROR):
                raise UnprovenError(
                    f"{name} differs by {error:.1e} of its range from what the pruned model should give"
                )


def outputs_of(model: PreTrainedModel, feeds: Feeds) -> Arrays:
    """What torch computes."""
    return run_torch(model, task_of(type(model).__name__), feeds)


def read(case: Case) -> None:
    """E and K of every layer."""
    model = load_model(case.checkpoint)
    row = family(case.model_type)
    config = row.counts(model.config)
    expected = (getattr(config, row.experts_key), getattr(config, row.top_k_key) if row.top_k_key else 1)
    for layer in find_moe_layers(model):
        if (layer.num_experts, layer.top_k) != expected:
            raise UnprovenError(f"E and K of layer {layer.name} are {(layer.num_experts, layer.top_k)}, not {expected}")


def calibrate(case: Case) -> None:
    """Tokens of every layer."""
    model = load_model(case.checkpoint)
    inputs = example_inputs(model, BATCH, SEQUENCE, seed=0)
    for layer in collect(model, [inputs]):
        if layer.token_count == 0:
            raise UnprovenError(f"text alone reaches no expert of layer {layer.name}")
        counted = int(layer["tokens"].sum())
        if counted != layer.token_count * layer.top_k:
            raise UnprovenError(f"{counted} selections of {layer.token_count} tokens in layer {layer.name}")


def prune_files(case: Case) -> None:
    """A smaller checkpoint, loaded again."""
    case.plan().save(case.root / "plan.json")
    prune(case.checkpoint, case.root / "plan.json", case.root / "pruned")
    case.require_pruned(outputs_of(load_model(case.root / "pruned"), case.feeds()))


def export_checkpoint(case: Case) -> None:
    """Checked against torch by `export` itself."""
    if not case.exported.exists():
        export(case.checkpoint, case.exported, RUNNER, cache=False)


def prune_graph(case: Case) -> None:
    """Fewer experts in ONNX; those of an attention, which no plan names, stay."""
    partial = family(case.model_type).attention_experts
    optimize(case.exported, case.root / "fewer", RUNNER, plan=case.plan(), form=FORM, allow_partial=partial)
    (got,) = RUNNER.run(case.root / "fewer" / MODEL, [case.feeds()])
    case.require_pruned(got)


def decode(case: Case) -> None:
    """`export` checks each call against torch; here it is one after the other against all at once, pruned too."""
    model = tiny(case.model_type)
    if model.config.is_encoder_decoder:
        raise UnprovenError("encoder-decoders are exported without a cache")
    architecture = type(model).__name__
    if not task_of(architecture).generates:
        raise UnprovenError(f"{architecture} is no decoder that writes text")
    cached = case.root / "cached"
    export(case.checkpoint, cached, RUNNER)
    require_same_in_steps(cached)
    names = {block.name for block in inspect_model(cached).blocks}  # a layer that no reader takes stays as it is
    layers = tuple(layer for layer in case.plan().layers if layer.name in names)
    if layers:
        plan = dataclasses.replace(case.plan(), layers=layers)
        optimize(cached, case.root / "fewer-cached", RUNNER, plan=plan, form=FORM, allow_partial=True)
        require_same_in_steps(case.root / "fewer-cached")


def require_same_in_steps(model: Path) -> None:
    """Several tokens, one, and several more give what all of them give at once; the first example is padded.

    Raises:
        UnprovenError: they give something else.
    """
    ids_BS = np.random.default_rng(2).integers(3, VOCABULARY, (BATCH, sum(STEPS)))
    mask_BS = np.ones_like(ids_BS)
    mask_BS[0, :2] = 0
    with RUNNER.open(model) as session:
        at_once = session.run(complete(session.inputs, {IDS: ids_BS, MASK: mask_BS}))["logits"]
        past: Arrays = {}
        steps = []
        for start, stop in itertools.pairwise((0, *itertools.accumulate(STEPS))):
            feeds = {IDS: ids_BS[:, start:stop], MASK: mask_BS[:, :stop], **past}
            outputs = session.run(complete(session.inputs, feeds))
            past = as_past(outputs)
            steps.append(outputs["logits"])
    seen = mask_BS != 0
    _, error = error_between(at_once[seen], np.concatenate(steps, axis=1)[seen])
    if error > MAX_ERROR:
        raise UnprovenError(f"logits of one step after the other differ by {error:.1e} of their range from all at once")


def build_engine(case: Case) -> None:
    """A layer whose router is not recognised stays as it was exported: TensorRT takes that too."""
    optimize(case.exported, case.root / FORM, RUNNER, form=FORM, allow_partial=True)
    build(case.root / FORM, find_target(TARGET), BuildOptions(), case.root / "engine")


WORK: Mapping[str, tuple[Callable[[Case], None], str | None]] = {
    "read": (read, None),
    "calibrated": (calibrate, "read"),
    "pruned": (prune_files, "read"),
    "exported": (export_checkpoint, "read"),
    "pruned in ONNX": (prune_graph, "exported"),
    "KV cache": (decode, "read"),
    "TensorRT-RTX": (build_engine, "exported"),
}
"""What proves a stage, and the stage that has to work before."""


def support_of(case: Case, stages: Collection[str]) -> Support:
    """What can be done with one family, tried."""
    model = tiny(case.model_type)
    if not case.checkpoint.exists():
        save_model(model, case.checkpoint)
    why_not: dict[str, str] = {}
    for stage, (work, needs) in WORK.items():
        if stage not in stages or needs in why_not:
            why_not[stage] = f"not {needs}" if stage in stages else NOT_TRIED
            continue
        try:
            work(case)
        except Exception as error:  # whatever it is, it is the reason
            why_not[stage] = reason(error, case)
    return Support(case.model_type, type(model).__name__, why_not)


def reason(error: Exception, case: Case) -> str:
    """One line; of a layer that no reader takes what the first reader says."""
    text = error.what if isinstance(error, UserError) else str(error)
    text = text.replace(f"{case.kept}/", "").replace(f"{case.root}/", "")
    first, *more = text.strip().splitlines() or [""]
    if len(more) > 1 and first.endswith("not recognised"):
        return f"router not recognised: {more[1].strip().removeprefix('experts: ')}"
    expected = isinstance(error, UserError | VerificationError | UnprovenError)
    return first if expected else f"{type(error).__name__}: {first}"


def prove(name: str, keep: Path | None = None, stages: Collection[str] = tuple(WORK)) -> Support:
    """The row of one family."""
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "kept" if keep is None else keep / name
        kept.mkdir(parents=True, exist_ok=True)
        return support_of(Case(name, kept, Path(scratch)), stages)


def write(row: Support, path: Path, stages: Collection[str] = tuple(WORK)) -> None:
    """Put what ``row`` says of ``stages`` into the table; other stages and families stay."""
    table = json.loads(path.read_text(encoding="utf-8"))["families"] if path.exists() else {}
    table |= {name: Support(name, "", {"read": why}).to_json() for name, why in UNKNOWN.items()}
    before = table.get(row.model_type, {"why_not": row.why_not})["why_not"]
    said = {stage: (row.why_not if stage in stages else before).get(stage) for stage in WORK}
    why_not = {stage: why for stage, why in said.items() if why is not None}
    table[row.model_type] = dataclasses.replace(row, why_not=why_not).to_json()
    versions = {name: importlib.metadata.version(name) for name in TOOLS}
    document = {"tools": versions, "families": dict(sorted(table.items()))}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def report(table: Sequence[Support], versions: Mapping[str, str]) -> str:
    """The whole document."""
    counts = [str(sum(row.reason(stage) is None for row in table)) for stage in STAGES]
    reasons = list(dict.fromkeys(why for row in table for stage in STAGES if (why := row.reason(stage)) is not None))

    def cell(why: str | None) -> str:
        return "yes" if why is None else f"[{reasons.index(why) + 1}]"

    lines = [[row.model_type, row.model, *(cell(row.reason(stage)) for stage in STAGES)] for row in table]
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    meanings = "\n".join(f"- *{stage}*: {meaning}" for stage, meaning in STAGES.items())
    notes = "\n".join(f"{number}. {why}" for number, why in enumerate(reasons, start=1))
    return f"""# Families

`python -m benchmarks.families` printed this, with {made_with}. It is what `moe-edge families` shows.

Every family has a tiny model of random weights: E={EXPERTS}, K={TOP_K}, H={HIDDEN}, two MoE layers, float32; the
language model alone, where transformers has that by itself. Every "yes" was run on it:

{meanings}

Nothing here was run on published weights, and no engine on a GPU. What is not proven has its reason below. The experts
in JetMoe's attention stay: it is pruned in ONNX with `--allow-partial`.

{markdown.table(("family", "model", *STAGES), [*lines, ["", "", *counts]], left=2)}

{notes}"""


def main() -> None:
    """Prove, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all, if none is named")
    parser.add_argument("--keep", type=Path, help="directory of checkpoints and exports")
    parser.add_argument("--stages", nargs="+", choices=WORK, default=list(WORK), help="what is tried")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.families or FAMILIES:
        row = prove(name, arguments.keep, arguments.stages)
        print(f"{name}: {dict(row.why_not) or 'everything'}", file=sys.stderr)
        write(row, Path(support.__file__).with_name(support.TABLE), arguments.stages)
    print(report(support.families(), support.tools()))


if __name__ == "__main__":
    main()
