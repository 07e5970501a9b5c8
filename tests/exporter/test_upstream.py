import pytest
import torch

from exporter.upstream import HEADS, translatable


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
