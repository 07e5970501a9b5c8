"""Checkpoints that are timed in torch compute what their exports compute, as they are and compiled."""

import re
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from exporter.timed_session import CompiledSession, TimedSession, require_compiler
from moe_spec.errors import UserError
from moe_spec.manifest import Manifest
from moe_spec.runner import error_between
from runtime.backends import open_session
from runtime.inputs.random_feeds import RandomFeeds

WARNS = "ignore:`torch.jit.script:DeprecationWarning"
"""Of itself, where torch 2.13 imports what it compiles with."""


def compiles(test):
    needed = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
    return needed(pytest.mark.filterwarnings(WARNS)(test))


def differs(export, session, feeds):
    """The largest error over all outputs, relative to their range."""
    with open_session(export, threads=1) as onnx, session:
        expected, found = onnx.run(feeds), session.run(feeds)
    assert expected.keys() == found.keys()
    return max(error_between(expected[name], found[name])[1] for name in expected)


@pytest.mark.parametrize(("length", "past"), [(7, 0), (1, 7)])
def test_a_decoder_goes_on_from_its_cache_as_its_export_does(zoo, length, past):
    export = zoo.cached("mixtral")
    session = TimedSession(zoo.decoder("mixtral"), Manifest.load(export), threads=1)
    feeds = RandomFeeds.of(session.inputs, export).draw(2, length, seed=0, past=past)
    assert differs(export, session, feeds) < 1e-5


def test_experts_are_computed_as_transformers_does_by_default(zoo):
    session = TimedSession(zoo.checkpoint("mixtral"), Manifest.load(zoo.exported("mixtral")), threads=1)
    assert session.model.get_experts_implementation() == {"": "grouped_mm"}


def test_torch_has_its_threads_back_afterwards(zoo):
    before = torch.get_num_threads()
    with TimedSession(zoo.checkpoint("mixtral"), Manifest.load(zoo.exported("mixtral")), threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_checkpoint_that_is_called_otherwise_is_refused(zoo):
    checkpoint = zoo.checkpoint("vmoe")
    message = (
        f"{checkpoint} takes pixel_values in torch, and the model beside it attention_mask, input_ids\n"
        "hint: time it beside what moe-edge exported of it"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        TimedSession(checkpoint, Manifest.load(zoo.exported("mixtral")), threads=1)


@compiles
def test_a_compiled_checkpoint_computes_the_same_in_one_piece(zoo):
    export = zoo.exported("moe_bert")
    session = CompiledSession(zoo.checkpoint("moe_bert"), Manifest.load(export), threads=1)
    graphs = counters["stats"]["unique_graphs"]
    assert differs(export, session, RandomFeeds.of(session.inputs, export).draw(1, 4, seed=0)) < 1e-5
    assert (counters["stats"]["unique_graphs"] - graphs, session.breaks()) == (1, [])


@compiles
def test_graph_breaks_are_told_with_their_reasons(zoo):
    session = CompiledSession(zoo.checkpoint("mixtral"), Manifest.load(zoo.exported("mixtral")), threads=1)
    counters["graph_break"]["Dynamic shape operator\n  Explanation: of nonzero"] += 2
    assert session.breaks() == ["2 x Dynamic shape operator"]


def test_a_compiler_that_is_missing_is_named():
    message = (
        "torch.compile needs a C++ compiler, and none was found\n"
        "hint: install g++, or name another in the variable CXX; or leave out --against torch.compile"
    )
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=f"^{re.escape(message)}$"),
    ):
        require_compiler()
