"""The task on few made-up posts and a tiny BERT; nothing is fetched."""

import dataclasses
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from benchmarks.tasks import newsgroups
from benchmarks.tasks.branches import classify, mix, run_trunk, train_all_but_experts, train_experts
from benchmarks.tasks.metrics import ACCURACY
from benchmarks.tasks.newsgroups import CLASSES, DOMAINS, METRIC, PostsRecipe, posts, read_posts, train
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Phase
from models.checkpoints import load_model
from models.moe_bert.upcycle import upcycle
from models.moe_layers import find_moe_layers
from moe_spec.dataset import load_dataset
from moe_spec.identity import checkpoint_sha256
from pruning.calibrate import calibrate

WORDS = [word for name in CLASSES for word in (f"{name}-a", f"{name}-b")]
SHORT = Phase(steps=2, batch_size=4, learning_rate=1e-3)
SMALL = newsgroups.Recipe(layers=3, moe_layers=(1, 2), branch=SHORT, mixed=dataclasses.replace(SHORT, balance=0.01))
FILES = ("finetune", "calibration", "test")
POSTS = PostsRecipe(tokens=8, train_per_class=6, calibration_per_class=2, test_per_class=3)


def silent(_line):
    """Hear nothing."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def minilm(tmp_path):
    """A checkpoint of a tiny dense BERT with a tokenizer of whole words."""
    directory = tmp_path / "minilm-0"
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def tab_files(tmp_path):
    """Ten posts of each newsgroup in both splits; the first of a newsgroup begins alike in both."""
    directory = tmp_path / "posts-0"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        lines = ["Category\tText", "d\tstring", "class\t", ""]
        for name, number in itertools.product(CLASSES, range(10)):
            drawn = generator.choice([f"{name}-a", f"{name}-b", WORDS[0], WORDS[-1]], 20)
            words = [f"{name}-a"] * 10 + [split] if number == 0 else drawn[: 3 + 2 * number]
            lines.append(f"{name}\t{' '.join(words)}")
        (directory / f"20newsgroups-{split}.tab").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def data(tab_files, minilm):
    return posts(tab_files, minilm / "tokenizer.json", POSTS)


def dense_of(minilm):
    return BertModel.from_pretrained(minilm, local_files_only=True).eval()


def trunk_of(dense, data, layers=1):
    examples = load_dataset(data / "finetune.npz")
    ids_NS, mask_NS = (torch.from_numpy(examples.feeds[name]) for name in ("input_ids", "attention_mask"))
    labels_N = torch.from_numpy(examples.labels)
    return run_trunk(dense, layers, ids_NS, mask_NS, labels_N, newsgroups.EXPERTS[labels_N])


def test_every_newsgroup_is_in_one_domain_and_no_domain_has_but_one():
    assert len(CLASSES) == len(set(CLASSES)) == 20
    assert all(len(groups) > 1 for groups in DOMAINS.values())


def test_posts_are_cut_or_padded_and_every_class_has_as_many(data):
    sizes = {"finetune": 6, "calibration": 2, "test": 3}
    for name, each in sizes.items():
        read = load_dataset(data / f"{name}.npz")
        assert read.feeds["input_ids"].shape == (20 * each, 8)
        assert read.labels is not None
        np.testing.assert_array_equal(np.bincount(read.labels), [each] * 20)
        np.testing.assert_array_equal(read.feeds["attention_mask"], read.feeds["input_ids"] != 0)


def test_no_test_post_looks_like_one_to_train_with_and_calibration_posts_are_of_those(data, tab_files, minilm):
    rows = {name: {tuple(row) for row in load_dataset(data / f"{name}.npz").feeds["input_ids"]} for name in FILES}
    train_rows = {tuple(row) for row in read_posts(tab_files, "train", minilm / "tokenizer.json", 8).ids_NS}
    assert not rows["test"] & train_rows
    assert rows["calibration"] <= rows["finetune"] <= train_rows
    test_posts = read_posts(tab_files, "test", minilm / "tokenizer.json", 8)
    assert {tuple(row) for row in test_posts.ids_NS} & train_rows


def test_trunk_and_the_rest_are_the_whole_model(data, minilm):
    dense = dense_of(minilm)
    model = upcycle(dense, CLASSES, num_hidden_layers=3, moe_layers=[1, 2])
    trunk = trunk_of(dense, data)
    feeds = {name: torch.from_numpy(array) for name, array in load_dataset(data / "finetune.npz").feeds.items()}
    with torch.no_grad():
        found = classify(model, trunk.layers, trunk.hidden_NSH, trunk.mask_NS)
        torch.testing.assert_close(found, model(**feeds).logits, atol=5e-3, rtol=0)  # the trunk is in bfloat16


def test_a_domain_has_its_own_labels(data, minilm):
    trunk = trunk_of(dense_of(minilm), data)
    taken = trunk.only([7, 3])
    assert sorted(taken.labels_N.tolist()) == [0] * 6 + [1] * 6
    torch.testing.assert_close(taken.hidden_NSH[taken.labels_N == 1], trunk.hidden_NSH[trunk.labels_N == 3])


def test_each_phase_trains_what_it_says_and_experts_are_those_of_the_branches(data, minilm):
    dense, generator = dense_of(minilm), np.random.default_rng(0)
    shape = {"num_hidden_layers": 3, "moe_layers": [1, 2]}
    trunk = trunk_of(dense, data)
    branches = [upcycle(dense, "ab", **shape, num_experts=1, num_experts_per_tok=1) for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in branches[0].state_dict().items()}
    train_experts(branches[0], trunk.only([0, 1]), SHORT, generator, silent)
    changed = {name for name, tensor in branches[0].state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.removeprefix("bert.encoder.layer.")[:22] for name in changed} == {
        "1.intermediate.experts",
        "2.intermediate.experts",
        "classifier.weight",
        "classifier.bias",
    }
    model = upcycle(dense, CLASSES, **shape, num_experts=2)
    mix(branches, model)
    trunk = dataclasses.replace(trunk, experts_N=trunk.experts_N % 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, *sources in zip(*map(find_moe_layers, (model, *branches)), strict=True):
        for expert, source in enumerate(sources):
            assert torch.equal(layer.experts.up_proj[expert], source.experts.up_proj[0])
            assert torch.equal(layer.experts.down_proj_bias[expert], source.experts.down_proj_bias[0])
        assert not torch.equal(layer.experts.up_proj[0], layer.experts.up_proj[1])
    train_all_but_experts(model, trunk, SHORT, generator, silent)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    above = {name for name in before if name.startswith(("bert.encoder.layer.1.", "bert.encoder.layer.2.", "class"))}
    assert changed == {name for name in above if ".experts." not in name}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_is_trained_once_and_is_a_task(data, minilm, tmp_path):
    told: list[str] = []
    checkpoint = train(data, minilm, SMALL, told.append)
    assert [line for line in told if "step" not in line] == [*DOMAINS, "mixed"]
    assert all(re.fullmatch(r"step 2/2: loss \d\.\d{3}", line) for line in told if "step" in line)
    heard = len(told)
    assert train(data, minilm, SMALL, told.append) == checkpoint
    assert len(told) == heard
    other = train(data, minilm, dataclasses.replace(SMALL, seed=1), silent)
    assert checkpoint_sha256(other) != checkpoint_sha256(checkpoint)
    files = {name: data / f"{name}.npz" for name in FILES}
    task = Task("posts", checkpoint, **files, metric=METRIC)
    assert task.training_seconds > 0
    assert json.loads((checkpoint / "config.json").read_text())["label2id"]["sci.med"] == CLASSES.index("sci.med")
    model = load_model(checkpoint)
    assert [(layer.num_experts, layer.top_k) for layer in find_moe_layers(model)] == [(8, 2)] * 2
    assert task.evaluate(model) == ACCURACY.measure(model, task.read(task.test)) <= 1
    statistics = calibrate(checkpoint, task.calibration, tmp_path / "statistics.safetensors")
    assert statistics.layers[0].token_count == load_dataset(task.calibration).feeds["attention_mask"].sum()


def test_training_makes_it_right_more_often(data, minilm):
    phase = Phase(steps=60, batch_size=16, learning_rate=1e-2)
    recipe = dataclasses.replace(SMALL, branch=SHORT, mixed=phase)
    model = newsgroups.branch_train_mix(dense_of(minilm), data, recipe, silent)
    assert METRIC.measure(model, load_dataset(data / "test.npz")) > 0.3  # by chance 0.05
