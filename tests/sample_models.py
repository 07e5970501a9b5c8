"""The models that samples make, and decoders of every kind of cache, exported and planned: what is built for GPUs."""

import dataclasses
import json
import runpy
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from exporter.export import export
from graph_passes.describe import read_model
from models.vmoe.assets import fashion_mnist
from moe_spec.layer_plan import FULL, ROWS, LayerPlan
from moe_spec.plan import PruningPlan
from tests.decoders import DECODERS
from tests.zoo import RUNNER, Zoo

SAMPLES = Path(__file__).parents[1] / "samples"

ALL, SIX, FOUR, TWO, ONE = tuple(range(8)), (0, 1, 2, 4, 5, 6), (0, 1, 4, 6), (3, 5), (2,)

SMOLLM2: Mapping[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
"""The Mixtral of sample 07 as its ``--quick`` makes it, with two layers; the whole has 30 such layers."""


@dataclasses.dataclass(frozen=True)
class SampleModel:
    """A model before it is pruned, and what becomes of each of its layers.

    Attributes:
        make: exports it into a directory.
        keep: the experts that stay.
        router: as in a plan.
    """

    make: Callable[[Zoo], Path]
    keep: tuple[int, ...] = FOUR
    router: str = ROWS

    def plan(self, exported: Path) -> PruningPlan:
        """The plan for that directory; K is that of the model where as many experts stay, else their number."""
        model = read_model(exported)
        layers = tuple(
            LayerPlan(
                block.name,
                block.num_experts,
                min(block.router.top_k, len(self.keep)),
                self.keep,
                groups=block.router.groups,
                router=self.router,
            )
            for block in model.blocks
        )
        return PruningPlan(model.model_sha256, "by hand", layers)


def _embedded(zoo: Zoo) -> Path:
    return zoo.once("embedded.exported", lambda path: export(fashion_mnist(), path, RUNNER))


def _one_expert_a_token(zoo: Zoo) -> Path:
    def make(path: Path) -> None:
        checkpoint = shutil.copytree(fashion_mnist(), path.with_suffix(".checkpoint"))
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
        export(checkpoint, path, RUNNER)

    return zoo.once("embedded-top-1.exported", make)


def _foreign(zoo: Zoo) -> Path:
    script = runpy.run_path(str(SAMPLES / "02_prune_a_foreign_onnx_file" / "export_foreign.py"))

    def make(path: Path) -> None:
        with warnings.catch_warnings(action="ignore"):  # torch.onnx calls what torch deprecates
            script["export_transformer"](fashion_mnist(), path)

    return zoo.once("embedded.foreign", make)


def _smollm2(zoo: Zoo) -> Path:
    def make(path: Path) -> None:
        torch.manual_seed(0)
        model, checkpoint = MixtralForCausalLM(MixtralConfig.from_dict(dict(SMOLLM2))), path.with_suffix(".checkpoint")
        model.bfloat16().save_pretrained(checkpoint)
        export(checkpoint, path, RUNNER, max_memory=0)  # the sample compares it with torch

    return zoo.once("smollm2.exported", make)


SAMPLE_MODELS: Mapping[str, SampleModel] = {
    "unpruned": SampleModel(_embedded, ALL),
    "pruned": SampleModel(_embedded),
    "foreign": SampleModel(_foreign),
    "two experts": SampleModel(_embedded, TWO),
    "one expert": SampleModel(_embedded, ONE),
    "top-1": SampleModel(_one_expert_a_token, SIX),
    "full router": SampleModel(_embedded, router=FULL),
    "smollm2": SampleModel(_smollm2, (0, 2)),
}
"""All of them the embedded V-MoE, but for the last, which has random weights here."""

MADE: Mapping[str, Mapping[str, str]] = {
    "01": {"exported": "unpruned", "optimized": "pruned"},
    "02": {"pruned": "foreign", "pruned-in-torch": "pruned"},
    "03": {"exported": "one expert", "dense": "one expert", "full": "unpruned", "all-experts": "unpruned"},
    "04": {"exported": "top-1", "optimized": "top-1"},
    "05": {"exported": "pruned", "optimized": "pruned"},
    "06": {"exported": "unpruned", "full": "full router", "rows": "pruned"},
    "07": {"exported": "smollm2"},
    "08": {"exported": "unpruned", "int8": "unpruned"},
    "09": {"exported": "pruned", "optimized": "pruned"},
    "10": {"exported": "unpruned", "optimized": "pruned"},
    "demo": {
        "keep-8": "unpruned",
        "keep-4": "pruned",
        "keep-2": "two experts",
        "keep-1": "one expert",
        "keep-2-recovered": "two experts",
    },
}
"""By sample: each directory that it exports or optimises a model into, and which of `SAMPLE_MODELS` that is.

Models of one graph are one, whatever its weights were trained, merged or rounded to.
"""

NOT_BUILT: Mapping[tuple[str, str], str] = {
    ("demo", "keep-6"): "what keeps four with other numbers; the demo builds it",
    ("02", "uneven"): "the V-MoE with four experts in one layer and three in the other: only numbers differ",
    ("02", "reachable"): "a bare MoE layer, which shows experts that nothing can choose",
    ("02", "again"): "the same bytes once more",
}
"""What samples make besides, and why that is no model to build."""

CACHED: Mapping[str, SampleModel] = {name: SampleModel(partial(Zoo.cached, name=name)) for name in DECODERS}
"""Decoders that no sample makes."""


def samples_of(model: str) -> str:
    """The samples that make it.

    >>> samples_of("top-1"), samples_of("two experts"), samples_of("mixtral")
    ('04', 'demo', '')
    """
    return ", ".join(sample for sample, made in MADE.items() if model in made.values())
