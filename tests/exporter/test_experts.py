"""What our experts function says of transformers' experts modules."""

import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling2.modeling_inkling2 import Inkling2Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

from exporter.experts import describe, experts_implementation, stacked
from models.moe_block import StackedExperts
from models.moe_layers import find_moe_layers
from moe_spec.experts_op import Activation, ExpertsOp
from tests.families.configs import tiny
from tests.models_table import TINY

SWIGLU = ExpertsOp(Activation("silu"), gated=True, interleaved=False, transposed=False, biased=False)
MLP = ExpertsOp(Activation("gelu"), gated=False, interleaved=False, transposed=False, biased=True)

DESCRIBED = {
    "mixtral": SWIGLU,
    "qwen3_moe": SWIGLU,
    "olmoe": SWIGLU,
    "deepseek_v3": SWIGLU,
    "granitemoe": SWIGLU,
    "gpt_oss": ExpertsOp(
        Activation("silu", 1.702, 7.0, 1.0), gated=True, interleaved=True, transposed=True, biased=True
    ),
    "vmoe": MLP,
    "moe_bert": MLP,
}

SIZES: Any = {"num_local_experts": 4, "hidden_size": 8, "intermediate_size": 8}
CONFIG: Any = SimpleNamespace(
    n_routed_experts=4,
    num_local_experts=4,
    hidden_size=8,
    intermediate_size=8,
    moe_hidden_size=8,
    moe_intermediate_size=8,
    hidden_act="silu",
    swiglu_limit=7.0,
    post_norm_eps=1e-6,
    mlp_gate_softcap=1.0,
    mlp_up_softcap=1.0,
)


@pytest.mark.parametrize("name", sorted(TINY))
def test_experts_are_described_by_what_they_compute(name):
    assert {describe(layer.experts) for layer in find_moe_layers(TINY[name]())} == {DESCRIBED[name]}


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("beam", Activation("silu")),
        ("deepseek_v4", Activation("silu", limit=10.0)),
        ("gemma4", Activation("gelu_tanh")),
        ("glm5_next", Activation("silu", limit=10.0)),
        ("lfm2_moe", Activation("silu")),
        ("minimax_m3_vl", Activation("silu", 1.702, 7.0, 1.0)),
        ("openai_privacy_filter", Activation("silu", 1.702, 7.0, 1.0)),
    ],
)
def test_gates_of_their_own_are_described_too(name, activation):
    assert {op.activation for layer in find_moe_layers(tiny(name)) if (op := describe(layer.experts))} == {activation}


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (functional.gelu, "gelu"),
        (functional.relu, "relu"),
        (functional.silu, "silu"),
        (torch.relu, "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"),
    ],
)
def test_activations_of_torch_are_what_they_compute(act, kind):
    up_ENH, down_EHF = torch.ones(2, 4, 3), torch.ones(2, 3, 4)
    op = describe(StackedExperts(up_ENH, down_EHF, act, gated=False))
    assert op is not None
    assert op.activation == Activation(kind)


def test_a_function_of_a_known_name_may_compute_something_else():
    def gelu(x):
        return functional.gelu(x, approximate="tanh")

    for act in (gelu, functools.partial(functional.gelu, approximate="tanh")):
        assert describe(StackedExperts(torch.ones(2, 4, 3), torch.ones(2, 3, 4), act, gated=False)) is None


INEXPRESSIBLE = {
    "a norm after each expert": lambda: MuseSparkExperts(CONFIG),
    "a gate of its own": lambda: Inkling2Experts(CONFIG),
    "an unknown activation": lambda: MixtralExperts(MixtralConfig(**SIZES, hidden_act="tanh")),
}
OTHERS = {
    "biases, interleaved, transposed": lambda: GptOssExperts(GptOssConfig(**SIZES)),
    "no gate": lambda: TINY["vmoe"]().get_submodule("layers.1.mlp.experts"),
}


@pytest.mark.parametrize("experts", INEXPRESSIBLE.values(), ids=INEXPRESSIBLE)
def test_what_the_node_cannot_express_is_no_node(experts):
    assert describe(experts()) is None


@pytest.mark.parametrize("make", [*INEXPRESSIBLE.values(), *OTHERS.values()], ids=[*INEXPRESSIBLE, *OTHERS])
def test_stacked_products_are_what_the_family_computes_one_by_one(make):
    experts, generator = make(), torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    experts.config._experts_implementation = "eager"
    experts_count, hidden = experts.num_experts, experts.down_proj.shape[2 if experts.is_transposed else 1]
    hidden_TH = torch.randn(5, hidden, generator=generator)
    weights_TK, ids_TK = torch.rand(5, experts_count, generator=generator).topk(2)
    with torch.no_grad():
        torch.testing.assert_close(
            stacked(experts, hidden_TH, ids_TK, weights_TK), experts(hidden_TH, ids_TK, weights_TK)
        )


def test_a_model_gets_its_experts_implementation_back_whatever_happens():
    model = TINY["olmoe"]()
    before = model.config._experts_implementation
    with contextlib.suppress(KeyboardInterrupt), experts_implementation(model, "eager"):
        assert model.config._experts_implementation == "eager"
        raise KeyboardInterrupt
    assert model.config._experts_implementation == before
