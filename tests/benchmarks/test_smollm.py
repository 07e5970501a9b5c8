"""SmolLM2 with experts, on a tiny dense model and made-up text; nothing is fetched."""

import dataclasses
import re

import pytest
import torch

from benchmarks import smollm as table
from benchmarks.tasks import smollm
from benchmarks.tasks.corpus import DOMAINS, TOKENIZER, train_tokenizer, write_blocks
from benchmarks.tasks.smollm import GENERAL, QUICK, Models, branch, mixture, train_routers
from benchmarks.tasks.training import Phase
from models.checkpoints import load_model, save_model
from models.upcycle import mix
from moe_spec.errors import UserError
from tests.models.dense import llama

SHORT = Phase(steps=2, batch_size=2, learning_rate=1e-2)
CORPUS = dataclasses.replace(QUICK.corpus, block=16, held_out=4)
SMALL = dataclasses.replace(QUICK, branch=SHORT, routers=dataclasses.replace(SHORT, guide=0.1), corpus=CORPUS)
EXPERTS = {domain: index for index, domain in enumerate(DOMAINS, start=1)}


def silent(_line):
    """Hear nothing."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dense(tmp_path):
    """A tiny checkpoint in bfloat16, with a tokenizer."""
    directory = tmp_path / "dense-0"
    tokenizer = train_tokenizer(["abc abd 123 124"], 256)
    save_model(llama(dtype=torch.bfloat16, vocab_size=256), directory)
    tokenizer.save(str(directory / TOKENIZER))
    return directory


@pytest.fixture
def data(tmp_path, dense):
    """Of each domain other letters."""
    texts = {
        domain: [chr(97 + 5 * index + part % 5) * 40 + str(part) for part in range(24)]
        for index, domain in enumerate(DOMAINS)
    }
    directory = tmp_path / "data-0"
    directory.mkdir()
    write_blocks(directory, texts, train_tokenizer(["abc"], 256), CORPUS)
    return directory


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_a_branch_trains_feed_forward_layers_only_and_is_found_again(dense, data):
    told: list[str] = []
    path = branch(dense, data, "code", SMALL, told.append)
    assert branch(dense, data, "code", SMALL, told.append) == path
    assert branch(dense, data, "novel", SMALL, silent) != path
    assert [bool(re.fullmatch(r"step 2/2: loss \d\.\d{3}", line)) for line in told] == [True]
    before, after = (table.load(directory) for directory in (dense, path))
    assert after.dtype == torch.bfloat16
    names = changed(after, before.state_dict())
    assert names == {name for name in before.state_dict() if ".mlp." in name}
    assert (path / TOKENIZER).is_file()


def test_routers_alone_learn_where_each_domain_goes():
    torch.manual_seed(0)
    model = mix([llama(seed, vocab_size=256) for seed in range(4)], top_k=1)
    blocks = {domain: torch.full((6, 8), 10 * index) + torch.arange(8) for domain, index in EXPERTS.items()}
    phase = Phase(steps=40, batch_size=1, learning_rate=1e-2, guide=1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_routers(model, blocks, EXPERTS, dataclasses.replace(SMALL, top_k=1, routers=phase), silent)
    assert changed(model, before) == {name for name in before if name.endswith(".mlp.gate.weight")}
    for domain, expert in EXPERTS.items():
        output = model(blocks[domain], output_router_logits=True)
        chosen = torch.stack([logits_TE.argmax(dim=-1) for logits_TE in output.router_logits])
        assert (chosen == expert).float().mean() > 0.9


def test_the_mixture_is_written_measured_pruned_and_talks(dense, data, monkeypatch):
    monkeypatch.setattr(table, "NEW_TOKENS", 3)
    monkeypatch.setattr(smollm, "dense", lambda _recipe: dense)
    monkeypatch.setattr(smollm, "corpus", lambda _model, _recipe: data)
    heard: list[str] = []
    document = table.document(SMALL, "COMMAND", heard.append)
    assert [line for line in heard[:8] if "step" not in line] == [*DOMAINS, "routers"]
    rows = re.findall(r"^\| (.*) \| 0 M \| (\d+\.\d) \| (\d+\.\d) \| (\d+\.\d) \|$", document, re.MULTILINE)
    ways = [*(f"for {domain}, by REAP" for domain in DOMAINS), "for the domain, by frequency", "at random"]
    kept = [f"{keep} kept {way}" for keep in (2, 1) for way in ways]
    assert [row[0] for row in rows] == [
        "SmolLM2, dense",
        "the branch of the domain, dense",
        "the MoE of 4 experts, K=2",
        *kept,
    ]
    assert len({row[1:] for row in rows}) > len(rows) / 2
    stay = re.findall(r"^\| \w+, ([12]) kept \| \w+ \| (\d) \| (\d) \| (\d) \| (\d) \|$", document, re.MULTILINE)
    assert all(sum(map(int, counts)) == 2 * int(keep) for keep, *counts in stay)
    assert len(stay) == 12
    assert float(re.findall(r"differs from that by at most\n(\S+) of", document)[0]) < 1e-5
    assert document.count("```text\n") == 3 * 4


def test_the_mixture_is_found_again_and_holds_the_branches(dense, data):
    branches = {GENERAL: dense} | {domain: branch(dense, data, domain, SMALL, silent) for domain in DOMAINS}
    path = mixture(branches, data, SMALL, silent)
    assert mixture(branches, data, SMALL, silent) == path
    model = load_model(path, dtype=None)
    assert model.dtype == torch.bfloat16
    for expert, source in enumerate(branches.values()):
        down = table.load(source).state_dict()["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(model.state_dict()["model.layers.1.mlp.experts.down_proj"][expert], down)
    assert Models(branches, path, data).dense == dense


def test_without_gguf_the_weights_cannot_be_read(monkeypatch):
    monkeypatch.setattr(smollm, "find_spec", lambda _name: None)
    message = "the weights are in a GGUF file, and gguf is not installed\nhint: pip install 'moe-edge[samples]'"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        smollm.dense(QUICK)
