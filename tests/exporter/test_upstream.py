import onnx_ir
import pytest
import torch
from onnxscript._framework_apis.torch_2_5 import get_torchlib_ops
from onnxscript._internal import ast_utils
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter._matcher import SimplePatternMatcher
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextIndexer

from exporter.upstream import HEADS, registered_quickly, rewritten_quickly, translatable
from tests.families.configs import tiny
from tests.models_table import HIDDEN


@pytest.mark.parametrize(("module", "heads"), HEADS, ids=["deepseek_v2", "llama4"])
def test_real_numbers_turn_as_complex_ones_do(module, heads):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, count, 3, 8, generator=generator).transpose(1, heads) for count in (4, 1))
    turns = torch.polar(torch.full((2, 3, 4), 1.5), torch.randn(2, 3, 4, generator=generator))
    original = module.apply_rotary_emb
    expected = original(queries, keys, turns)
    with translatable():
        assert module.apply_rotary_emb is not original
        torch.testing.assert_close(module.apply_rotary_emb(queries, keys, turns), expected)
    assert module.apply_rotary_emb is original


CLIPPED = """<ir_version: 10, opset_import: ["" : 20]> clipped (float[2, 8] x) => (float[2, 8] y) {
    once = Relu (x)
    twice = Relu (once)
    left, right = Split <axis = 1, num_outputs = 2> (twice)
    y = Concat <axis = 1> (right, left)
}"""


def test_the_optimizer_does_the_same_when_it_is_quick(monkeypatch):
    expected, got = (onnx_ir.from_onnx_text(CLIPPED) for _ in range(2))
    tried = []

    def match(self, model, graph, node, original=SimplePatternMatcher.match, **options):
        tried.append(node)
        return original(self, model, graph, node, **options)

    monkeypatch.setattr(SimplePatternMatcher, "match", match)
    optimize_ir(expected)
    slow = len(tried)
    tried.clear()
    with rewritten_quickly():
        optimize_ir(got)
    assert [node.op_type for node in expected.graph] == ["Relu", "Split", "Concat"]
    assert onnx_ir.to_onnx_text(got) == onnx_ir.to_onnx_text(expected)
    assert len(tried) < slow / 5
    with pytest.raises(RuntimeError), rewritten_quickly():
        raise RuntimeError
    assert vars(SimplePatternMatcher)["match"] is match


def test_translations_are_the_same_without_parsing_them(monkeypatch):
    expected = get_torchlib_ops()
    monkeypatch.delattr(ast_utils, "get_src_and_ast")
    with registered_quickly():
        assert get_torchlib_ops() == expected
    with pytest.raises(AttributeError, match="get_src_and_ast"):
        get_torchlib_ops()


def test_what_is_masked_is_filled_instead_of_searched_for():
    class Masked(torch.nn.Module):
        def forward(self, ids):
            kept = ids.clone()
            kept[ids == 7] = 0
            return kept

    ids = torch.tensor([[1, 7, 3], [7, 7, 2]])
    with translatable():
        traced = torch.export.export(Masked(), (ids,)).graph
        torch.testing.assert_close(Masked()(ids), torch.tensor([[1, 0, 3], [0, 0, 2]]))
    called = {node.target for node in traced.nodes if node.op == "call_function"}
    assert torch.ops.aten.masked_fill_.Scalar in called
    assert torch.ops.aten.index_put_.default not in called


def test_pools_that_are_valid_nowhere_change_no_choice():
    """The tokens that are no padding fill fewer pools than all do."""
    indexer = next(module for module in tiny("glm5_next").modules() if isinstance(module, Glm5NextTextIndexer))
    pool = indexer.index_kpool
    mask = torch.arange(4 * pool)[None] >= torch.tensor([[pool + 3], [pool + 1]])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*mask.shape, HIDDEN, generator=generator)
    residual = torch.randn(*mask.shape, indexer.wq_b.in_features, generator=generator)
    packed = torch.randn(*mask.shape, 2 * indexer.head_dim, generator=generator)
    packed = torch.cat([packed, mask[..., None]], dim=-1)
    valid = indexer.get_pooled_states(packed)[2]
    expected = indexer(hidden, residual, mask, None)
    with translatable():
        assert indexer.get_pooled_states(packed)[2].shape[1] > valid.shape[1] > 0
        got = indexer(hidden, residual, mask, None)
    assert indexer.get_pooled_states(packed)[2].shape == valid.shape
    torch.testing.assert_close(got.sort(dim=-1).values, expected.sort(dim=-1).values)
    assert (expected >= 0).any()
