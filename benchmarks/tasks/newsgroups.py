"""20 Newsgroups, classified by a pretrained MiniLM with experts: a branch trained on each domain, then all mixed.

A pruned model is to be judged in seconds and the model trained in minutes, on one thread. So it has the lower layers of
MiniLM only, reads the first tokens of a post, its subject and opening, and the test data are a sample of the official
test split, the same for every seed.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import BertModel

from benchmarks.tasks.branches import mix, run_trunk, train_all_but_experts, train_experts
from benchmarks.tasks.cache import cached
from benchmarks.tasks.metrics import ACCURACY, accuracy
from benchmarks.tasks.sources import MINILM, NEWSGROUPS, fetch
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Phase, Report
from models.checkpoints import save_model
from models.moe_bert.modeling import MoeBertForSequenceClassification
from models.moe_bert.upcycle import upcycle
from moe_spec.dataset import MASK, load_dataset
from moe_spec.record import Json

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "software": ("comp.graphics", "comp.os.ms-windows.misc", "comp.windows.x"),
    "hardware": ("comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware", "misc.forsale"),
    "traffic": ("rec.autos", "rec.motorcycles"),
    "sport": ("rec.sport.baseball", "rec.sport.hockey"),
    "signals": ("sci.crypt", "sci.electronics"),
    "nature": ("sci.med", "sci.space"),
    "politics": ("talk.politics.guns", "talk.politics.mideast", "talk.politics.misc"),
    "religion": ("alt.atheism", "soc.religion.christian", "talk.religion.misc"),
}
"""The newsgroups by domain, one expert each: the hierarchies, and the large ones of them in two."""

CLASSES = tuple(sorted(group for groups in DOMAINS.values() for group in groups))
"""Label ``i`` is the newsgroup ``CLASSES[i]``."""

EXPERTS = torch.tensor([[name in groups for groups in DOMAINS.values()].index(True) for name in CLASSES])
"""(C,): the domain, and so the expert, of every label."""

HEAD_LINES = 3
"""Of an Orange .tab file: names, types and roles of its columns."""

METRIC = dataclasses.replace(ACCURACY, measure=functools.partial(accuracy, batch_size=50))
"""Batches that fit into a processor's cache: accuracy does not depend on them, its time does."""


BRANCH = Phase(steps=25, batch_size=32, learning_rate=1.5e-3)
MIXED = Phase(steps=150, batch_size=32, learning_rate=1e-3, balance=0.01, guide=0.2)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclasses.dataclass(frozen=True)
class PostsRecipe:
    """What the examples depend on, beside the posts.

    Attributes:
        tokens: S: [CLS], the first ones of a post, [SEP]; a short post is padded.
        train_per_class: posts of each newsgroup, drawn at random.
        calibration_per_class: of those for training.
        test_per_class: of the test split; a post that looks like one of the training split is none of them.
        version: raised when the code below makes something else of the same numbers.
    """

    tokens: int = 48
    train_per_class: int = 350
    calibration_per_class: int = 10
    test_per_class: int = 25
    version: int = 1


@dataclasses.dataclass(frozen=True)
class Posts:
    """Token ids and mask (N, S), and labels (N,)."""

    ids_NS: npt.NDArray[np.int64]
    mask_NS: npt.NDArray[np.int64]
    labels_N: npt.NDArray[np.int64]

    def take(self, index_M: npt.NDArray[np.integer]) -> "Posts":
        """Those at ``index_M``, in that order."""
        return Posts(self.ids_NS[index_M], self.mask_NS[index_M], self.labels_N[index_M])

    def of_each_class(self, count: int) -> "Posts":
        """The first ``count`` of every newsgroup, or all that there are; the order stays."""
        first = [np.flatnonzero(self.labels_N == label)[:count] for label in range(len(CLASSES))]
        return self.take(np.sort(np.concatenate(first)))

    def unlike(self, others: "Posts") -> "Posts":
        """Those whose tokens are not also those of one of ``others``: several posts begin alike, or are the same."""
        known = {ids_S.tobytes() for ids_S in others.ids_NS}
        return self.take(np.flatnonzero([ids_S.tobytes() not in known for ids_S in self.ids_NS]))

    def save(self, path: Path) -> None:
        """Task data as ``moe-edge calibrate`` takes it."""
        np.savez_compressed(path, input_ids=self.ids_NS, attention_mask=self.mask_NS, labels=self.labels_N)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the model depends on, beside the examples and the code. It has an expert for each of ``DOMAINS``.

    Attributes:
        seed: of routers, classifiers, and the order of examples.
        layers: of MiniLM, from below.
        moe_layers: which of them (zero-based) have experts; those below the first are not trained.
        top_k: K.
        branch: how the experts of each domain are trained, on its posts only.
        mixed: how everything else above the trunk is trained then, on all posts.
        version: raised when the code below makes something else of the same numbers.
    """

    seed: int = 0
    layers: int = 4
    moe_layers: tuple[int, ...] = (2, 3)
    top_k: int = 2
    branch: Phase = BRANCH
    mixed: Phase = MIXED
    version: int = 1


def task(seed: int, report: Report) -> Task:
    """Name the newsgroup of a post. The checkpoint is trained the first time it is asked for.

    Args:
        seed: of the training.
        report: told how it goes.

    Raises:
        UserError: posts or weights cannot be fetched.
    """
    minilm = fetch(MINILM)
    data = posts(fetch(NEWSGROUPS), minilm / "tokenizer.json", PostsRecipe())
    return Task(
        name="newsgroups",
        checkpoint=train(data, minilm, Recipe(seed=seed), report),
        calibration=data / "calibration.npz",
        finetune=data / "finetune.npz",
        test=data / "test.npz",
        metric=METRIC,
    )


def posts(tab_files: Path, tokenizer: Path, recipe: PostsRecipe) -> Path:
    """The directory with ``{finetune,calibration,test}.npz``; made the first time.

    Args:
        tab_files: directory with the splits as Orange publishes them; its name is part of what the result is found by.
        tokenizer: tokenizer.json; the name of its directory is, too.
        recipe: how.
    """

    def make(directory: Path) -> Json:
        train, test = (_shuffled(read_posts(tab_files, split, tokenizer, recipe.tokens)) for split in ("train", "test"))
        finetune = train.of_each_class(recipe.train_per_class)
        finetune.save(directory / "finetune.npz")
        finetune.of_each_class(recipe.calibration_per_class).save(directory / "calibration.npz")
        test.unlike(train).of_each_class(recipe.test_per_class).save(directory / "test.npz")
        return {}

    sources = {"posts": tab_files.name, "tokenizer": tokenizer.parent.name}
    return cached("newsgroups", dataclasses.asdict(recipe) | sources, make)


def read_posts(tab_files: Path, split: str, tokenizer: Path, tokens: int) -> Posts:
    """All of ``20newsgroups-SPLIT.tab``, cut to ``tokens`` tokens each, or padded."""
    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(tokens)
    encoder.enable_padding(length=tokens)
    lines = (tab_files / f"20newsgroups-{split}.tab").read_text(encoding="utf-8").splitlines()[HEAD_LINES:]
    rows = [line.split("\t") for line in lines if line]
    encoded = encoder.encode_batch([text for _, text in rows])
    return Posts(
        np.array([encoding.ids for encoding in encoded]),
        np.array([encoding.attention_mask for encoding in encoded]),
        np.array([CLASSES.index(newsgroup) for newsgroup, _ in rows]),
    )


def _shuffled(all_posts: Posts) -> Posts:
    """Always in the same order."""
    return all_posts.take(np.random.default_rng(0).permutation(len(all_posts.labels_N)))


def train(data: Path, minilm: Path, recipe: Recipe, report: Report) -> Path:
    """The checkpoint of ``recipe``; trained the first time.

    Args:
        data: what ``posts`` gives.
        minilm: checkpoint of a dense BERT. Its name and that of ``data`` are part of what the result is found by.
        recipe: seed and hyper-parameters.
        report: told how it goes.
    """

    def make(directory: Path) -> Json:
        dense = BertModel.from_pretrained(minilm, local_files_only=True, dtype=torch.float32)
        start = time.process_time()
        save_model(branch_train_mix(dense, data, recipe, report), directory)
        return {"training_seconds": time.process_time() - start}

    sources = {"posts": data.name, "weights": minilm.name}
    return cached(f"newsgroups-seed{recipe.seed}", dataclasses.asdict(recipe) | sources, make)


def branch_train_mix(dense: BertModel, data: Path, recipe: Recipe, report: Report) -> MoeBertForSequenceClassification:
    """Experts from one branch of ``dense`` a domain, then all else above the trunk, on ``finetune.npz`` in ``data``."""
    torch.manual_seed(recipe.seed)
    generator = np.random.default_rng(recipe.seed)
    examples = load_dataset(data / "finetune.npz")
    ids_NS, mask_NS, labels_N = map(
        torch.from_numpy, (examples.feeds["input_ids"], examples.feeds[MASK], examples.labels)
    )
    trunk = run_trunk(dense, min(recipe.moe_layers), ids_NS, mask_NS, labels_N, EXPERTS[labels_N])
    shape = {"num_hidden_layers": recipe.layers, "moe_layers": recipe.moe_layers, **NO_DROPOUT}
    branches = []
    for domain, groups in DOMAINS.items():
        report(domain)
        branches.append(upcycle(dense, groups, **shape, num_experts=1, num_experts_per_tok=1))
        of_domain = trunk.only([CLASSES.index(group) for group in groups])
        train_experts(branches[-1], of_domain, recipe.branch, generator, report)
    model = upcycle(dense, CLASSES, **shape, num_experts=len(DOMAINS), num_experts_per_tok=recipe.top_k)
    mix(branches, model)
    report("mixed")
    train_all_but_experts(model, trunk, recipe.mixed, generator, report)
    return model
