import onnx_ir
import pytest
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter._matcher import SimplePatternMatcher

from exporter.upstream import HEADS, rewritten_quickly, translatable


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
