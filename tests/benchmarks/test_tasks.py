"""The tasks' parts on little text and tiny models; nothing is fetched."""

import dataclasses
import gzip
import hashlib
import io
import math
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from transformers import MixtralForCausalLM

from benchmarks.tasks import TASKS, __main__, cache, language, sources
from benchmarks.tasks import images as tasks_images
from benchmarks.tasks.cache import cached
from benchmarks.tasks.corpus import (
    CorpusRecipe,
    read_blocks,
    read_documents,
    to_blocks,
    train_tokenizer,
    write_corpus,
)
from benchmarks.tasks.images import draw, images
from benchmarks.tasks.metrics import ACCURACY, PERPLEXITY, expert_usage, total_variation
from benchmarks.tasks.sources import MANAGERS, PACKAGES, Package, check_sha256, download, fetch, unpack
from benchmarks.tasks.task import Task
from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from models.vmoe.assets import fashion_mnist
from models.vmoe.idx import FILES
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from pruning.calibrate import calibrate
from tests.models_table import EXPERTS, TINY, TOP_K, VOCABULARY, example_inputs

TEXTS = {
    "letters": [f"{chr(97 + index % 26) * 40} {index}" for index in range(40)],
    "digits": [f"{index * 7919} " * 12 for index in range(40)],
}
SMALL = CorpusRecipe(vocabulary=270, block=8, held_out=4, train_blocks=50, calibration_blocks=5, test_blocks=9)
RECIPE = language.Recipe(hidden=16, width=16, layers=1, heads=2, experts=4, blocks_per_domain=2, steps=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_corpus(tmp_path):
    directory = tmp_path / "corpus-0"
    directory.mkdir()
    write_corpus(directory, TEXTS, SMALL)
    return directory


def language_task(data, checkpoint):
    files = {name: data / f"{name}.npz" for name in ("calibration", "finetune", "test")}
    return Task(data.name, checkpoint, **files, metric=PERPLEXITY)


def tar(path, **files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def manager(monkeypatch, tmp_path, script):
    """A program of that name that stands in for npm."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def package(**changes):
    return dataclasses.replace(Package("npm", "@some/where", "1.0", "0" * 64, r"data/(\w+\.txt)", "MIT"), **changes)


def test_what_was_made_is_found_again_by_its_recipe(own_cache):
    made = []

    def make(directory):
        made.append(directory)
        (directory / "file").write_text("x")
        return {"seconds": 1}

    first = cached("thing", {"seed": 0}, make)
    assert cached("thing", {"seed": 0}, make) == first
    assert cached("thing", {"seed": 1}, make) != first
    assert len(made) == 2
    assert first.parent == own_cache
    assert sorted(path.name for path in first.iterdir()) == ["file", "recipe.json"]
    assert (first / "recipe.json").read_text() == '{\n "seconds": 1,\n "seed": 0\n}\n'


def test_what_failed_to_be_made_leaves_nothing(own_cache):
    def fail(directory):
        (directory / "half").write_text("x")
        raise UserError("no", hint="later")

    with pytest.raises(UserError):
        cached("thing", {}, fail)
    assert list(own_cache.iterdir()) == []


def test_without_the_variable_the_cache_is_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_EDGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "moe-edge"


def test_a_package_is_downloaded_once_and_only_what_is_wanted_is_taken(monkeypatch, tmp_path):
    archive = tar(tmp_path / "it.tgz", **{"data/one.txt": "1", "data/two.txt": "2", "code.js": "run me"})
    manager(monkeypatch, tmp_path, f'echo "$@" >> {tmp_path}/calls; cp {archive} .')
    wanted = package(sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    directory = fetch(wanted)
    assert fetch(wanted) == directory
    assert (tmp_path / "calls").read_text() == "pack --silent @some/where@1.0\n"
    files = {path.name: path.read_text() for path in directory.glob("*.txt")}
    assert files == {"one.txt": "1", "two.txt": "2"}
    assert not (directory / "code.js").exists()


def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    path = tmp_path / "it.tgz"
    path.write_bytes(b"moe")
    found = hashlib.sha256(b"moe").hexdigest()
    expected = (
        f"it.tgz has sha256 {found}, expected {'0' * 64}\n"
        "hint: it is another file than the results were made with; get it from a source you trust"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        check_sha256(path, "0" * 64)


def test_a_missing_manager_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = "@some/where@1.0 comes with npm, which is not installed\nhint: install npm"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        download(package(), tmp_path)


@pytest.mark.parametrize(
    ("script", "said"), [("echo first >&2; echo no such thing >&2; exit 1", "no such thing"), ("exit 0", "0 files")]
)
def test_a_manager_that_fails_is_quoted(monkeypatch, tmp_path, script, said):
    manager(monkeypatch, tmp_path, script)
    here = tmp_path / "here"
    here.mkdir()
    expected = (
        f"npm could not download @some/where@1.0: {said}\nhint: see what `npm pack --silent @some/where@1.0` says"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        download(package(), here)


def test_a_member_that_leads_out_is_refused(tmp_path):
    path = tar(tmp_path / "it.tgz", **{"data/../../up.txt": "x"})
    expected = (
        f"{path} names the file '../up.txt', which lies outside {tmp_path / 'out'}\n"
        "hint: a model may only name files in its own directory; get the model from a source you trust"
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        unpack(MANAGERS["npm"].read(path), r"data/\.\./(.*)", tmp_path / "out", path)
    assert not (tmp_path / "up.txt").exists()


def test_links_are_not_followed_and_an_archive_without_what_is_wanted_is_refused(tmp_path):
    path = tar(tmp_path / "it.tgz")
    (tmp_path / "out").mkdir()
    expected = "it.tgz holds no file 'data/(.*)'\nhint: its layout is not the pinned package's"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        unpack(MANAGERS["npm"].read(path), "data/(.*)", tmp_path / "out", path)


def test_wheels_are_read_and_tests_in_them_are_no_text(tmp_path):
    path = tmp_path / "it.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("networkx/a.py", "networkx/b/c.py", "networkx/b/tests/test_c.py", "networkx/data.json"):
            archive.writestr(name, name)
        archive.mkdir("networkx/empty.py")
    (tmp_path / "out").mkdir()
    unpack(MANAGERS["pip"].read(path), sources.NETWORKX.members, tmp_path / "out", path)
    assert read_documents(tmp_path / "out") == ["networkx/a.py", "networkx/b/c.py"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb comes with Debian")
def test_debian_packages_are_read(tmp_path):
    tree, path = tmp_path / "tree", tmp_path / "it.deb"
    data = tree / "usr/share/datasets/fashion-mnist"
    data.mkdir(parents=True)
    (data / "train-labels-idx1-ubyte.gz").write_bytes(b"labels")
    (data / "README").write_text("not asked for")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: it\nVersion: 1\nArchitecture: all\nMaintainer: us <us@example.org>\nDescription: data\n"
    )
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, path], check=True, capture_output=True)
    (tmp_path / "out").mkdir()
    unpack(MANAGERS["apt"].read(path), sources.FASHION_MNIST.members, tmp_path / "out", path)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        "train-labels-idx1-ubyte.gz": b"labels"
    }


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_packages_are_pinned(package):
    assert package.manager in MANAGERS
    assert re.fullmatch("[0-9a-f]{64}", package.sha256)
    assert re.compile(package.members).groups == 1


def test_blocks_hold_one_document_each_and_no_padding():
    tokenizer = train_tokenizer(["abab abab", "cdcd"], 260)
    documents = ["abababab", "cd", "cdcdcdcd é"]
    blocks_NS = to_blocks(tokenizer, documents, 4)
    texts = [tokenizer.decode(ids) for ids in blocks_NS.tolist()]
    assert all(any(document.startswith(text) or text in document for document in documents) for text in texts)
    assert blocks_NS.shape[1] == 4
    assert tokenizer.decode(tokenizer.encode("an é that it never saw").ids) == "an é that it never saw"


def test_test_documents_are_in_no_other_file(small_corpus):
    for domain in TEXTS:
        train, test = (read_blocks(small_corpus / domain / f"{name}.npz") for name in ("finetune", "test"))
        calibration = read_blocks(small_corpus / domain / "calibration.npz")
        assert (len(calibration), len(test)) == (5, 9)
        rows = {tuple(row) for row in train.tolist()}
        assert {tuple(row) for row in calibration.tolist()} <= rows
        mask = load_dataset(small_corpus / domain / "test.npz").feeds["attention_mask"]
        assert mask.shape == test.shape
        assert mask.all()
    held_out = {tuple(row) for row in read_blocks(small_corpus / "digits" / "test.npz").tolist()}
    assert not held_out & {tuple(row) for row in read_blocks(small_corpus / "digits" / "finetune.npz").tolist()}


def test_two_steps_train_a_checkpoint_that_is_found_again(small_corpus, tmp_path, own_cache):
    told: list[str] = []
    checkpoint = language.train(small_corpus, RECIPE, told.append)
    assert re.fullmatch(r"step 2/2: loss \d\.\d{3}", told[0])
    assert language.train(small_corpus, RECIPE, told.append) == checkpoint
    assert len(told) == 1
    other = language.train(small_corpus, dataclasses.replace(RECIPE, seed=1), told.append)
    assert other != checkpoint
    assert checkpoint_sha256(other) != checkpoint_sha256(checkpoint)
    task = language_task(small_corpus / "digits", checkpoint)
    assert task.training_seconds > 0
    model = load_model(checkpoint)
    assert find_moe_layers(model)[0].num_experts == 4
    assert 100 < task.evaluate(model) < 1000
    statistics = calibrate(checkpoint, task.calibration, tmp_path / "statistics.safetensors")
    assert statistics.layers[0].token_count == 5 * SMALL.block


def test_training_lowers_perplexity(small_corpus):
    blocks = {domain: read_blocks(small_corpus / domain / "finetune.npz") for domain in TEXTS}
    recipe = dataclasses.replace(RECIPE, steps=60, warmup_steps=3)
    torch.manual_seed(0)
    model = MixtralForCausalLM(language.model_config(recipe, 270))
    data = load_dataset(small_corpus / "digits" / "test.npz")
    before = PERPLEXITY.measure(model, data)
    language.fit(model, blocks, recipe, lambda _line: None)
    assert PERPLEXITY.measure(model, data) < before / 2


def test_each_layer_is_balanced_for_itself():
    """All layers' shares together would hide that one layer uses some experts and another layer the others."""
    model = TINY["mixtral"]()
    ids = example_inputs(model, 2, 5, seed=0)["input_ids"]
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    expected = output.loss.item()
    for logits_TE in output.router_logits:
        selected_TE = torch.nn.functional.one_hot(logits_TE.topk(TOP_K).indices, EXPERTS).sum(1).float()
        expected += 0.5 * EXPERTS * (selected_TE.mean(0) * logits_TE.softmax(-1).mean(0)).sum().item()
    assert language.training_loss(model, ids, 0.5).item() == pytest.approx(expected)


def test_perplexity_is_that_of_every_token_but_the_first():
    model = TINY["mixtral"]()
    ids = example_inputs(model, 3, 6, seed=0)["input_ids"]
    data = Dataset({"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids)}, None, "")
    expected = math.exp(model(input_ids=ids, labels=ids).loss.item())
    assert PERPLEXITY.measure(model, data) == pytest.approx(expected, rel=1e-4)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert PERPLEXITY.measure(model, data) == pytest.approx(VOCABULARY, rel=1e-4)


def test_accuracy_is_the_share_of_right_labels():
    checkpoint = fashion_mnist()
    data = load_dataset(checkpoint / "test.npz", checkpoint).first(50)
    model = load_model(checkpoint)
    right = ACCURACY.measure(model, data)
    assert right > 0.8
    assert data.labels is not None
    wrong = dataclasses.replace(data, labels=(data.labels + 1) % 10)
    assert ACCURACY.measure(model, wrong) <= 1 - right


def test_usage_is_a_share_of_selections_and_differs_by_what_is_read():
    model = TINY["olmoe"]()
    feeds = {name: tensor.numpy() for name, tensor in example_inputs(model, 4, 8, seed=0).items()}
    usage_LE = expert_usage(model, Dataset(feeds, None, ""))
    np.testing.assert_allclose(usage_LE.sum(axis=1), 1)
    other_LE = expert_usage(model, Dataset({"input_ids": np.full((1, 8), 5)}, None, ""))
    distance_L = total_variation(usage_LE, other_LE)
    assert ((distance_L > 0.2) & (distance_L <= 1)).all()
    np.testing.assert_array_equal(total_variation(usage_LE, usage_LE), 0)


def test_images_become_task_data(tmp_path):
    for name in FILES:
        shape = (4, 28, 28) if "images" in name else (4,)
        header = b"\x00\x00\x08" + bytes([len(shape)]) + np.asarray(shape, ">u4").tobytes()
        content = np.arange(math.prod(shape)).astype(np.uint8).tobytes()
        (tmp_path / name).write_bytes(gzip.compress(header + content))
    directory = images(tmp_path)
    assert images(tmp_path) == directory
    data = load_dataset(directory / "finetune.npz", fashion_mnist())
    assert data.feeds["pixel_values"].shape == (4, 1, 28, 28)
    np.testing.assert_array_equal(data.labels, range(4))


def test_calibration_images_are_drawn_out_of_the_training_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks_images, "CALIBRATION_IMAGES", 5)
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    np.savez_compressed(tmp_path / "finetune.npz", images=pictures, labels=np.arange(20))
    drawn = [draw(tmp_path / "finetune.npz", seed) for seed in (0, 1)]
    assert draw(tmp_path / "finetune.npz", 0) == drawn[0]
    labels = []
    for path in drawn:
        with np.load(path) as calibration:
            labels.append(set(calibration["labels"].tolist()))
            np.testing.assert_array_equal(calibration["images"], pictures[calibration["labels"]])
    assert [len(chosen) for chosen in labels] == [5, 5]
    assert labels[0] != labels[1]


def test_the_document_has_a_line_for_each_task_and_compares_those_that_share_a_model(
    small_corpus, monkeypatch, capsys, tmp_path
):
    checkpoint = language.train(small_corpus, RECIPE, lambda _line: None)

    def make(name):
        return lambda _seed, _report: language_task(small_corpus / name, checkpoint)

    monkeypatch.setattr(__main__, "TASKS", {name: make(name) for name in TEXTS})
    monkeypatch.setattr(sys, "argv", ["tasks", "--seed", "3"])
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("`python -m benchmarks.tasks --seed 3` printed this on ")
    assert any(line.startswith("| letters | mixtral | 1 x 4 experts, K=2 | ") for line in lines)
    assert any(re.fullmatch(r"\| letters and digits \| [01]\.\d\d \|", line) for line in lines)
    assert any(re.fullmatch(r"\| two halves of digits \| [01]\.\d\d \|", line) for line in lines)
    assert sum(line.startswith("| model.layers.0.mlp | ") for line in lines) == 2


def test_what_cannot_be_fetched_ends_with_the_mend(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["tasks", "--task", "images"])
    with pytest.raises(SystemExit, match=r"^error: dataset-fashion-mnist=.* comes with apt-get, which"):
        __main__.main()


def test_tasks_are_named():
    assert list(TASKS) == ["images", "novel", "speeches", "code", "newsgroups"]
