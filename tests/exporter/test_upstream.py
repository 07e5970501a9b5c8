import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from exporter.upstream import translatable


def test_real_numbers_turn_as_complex_ones_do():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 1))
    turns = torch.polar(torch.full((2, 3, 4), 1.5), torch.randn(2, 3, 4, generator=generator))
    original = modeling_deepseek_v2.apply_rotary_emb
    expected = original(queries, keys, turns)
    with translatable():
        assert modeling_deepseek_v2.apply_rotary_emb is not original
        torch.testing.assert_close(modeling_deepseek_v2.apply_rotary_emb(queries, keys, turns), expected)
    assert modeling_deepseek_v2.apply_rotary_emb is original
