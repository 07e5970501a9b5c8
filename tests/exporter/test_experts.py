"""What our experts function says of transformers' experts modules."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import MixtralConfig
from transformers.models.inkling2.modeling_inkling2 import Inkling2Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

from exporter.experts import describe, experts_implementation
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
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
    assert {describe(layer.experts).activation for layer in find_moe_layers(tiny(name))} == {activation}


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (lambda: MuseSparkExperts(CONFIG), "MuseSparkExperts has a norm after each expert"),
        (lambda: Inkling2Experts(CONFIG), "Inkling2Experts has a gate of its own"),
        (lambda: MixtralExperts(MixtralConfig(hidden_act="tanh")), "MixtralExperts has activation Tanh"),
    ],
    ids=["norm", "gate", "activation"],
)
def test_what_the_node_cannot_express_is_refused(experts, reason):
    with pytest.raises(UserError) as refusal:
        describe(experts())
    assert refusal.value.what == f"{reason}, which the exported experts node cannot express"
    assert refusal.value.hint == (
        "export the model with transformers' batched_mm experts and prune the ONNX file with `moe-edge optimize`"
    )


def test_a_model_gets_its_experts_implementation_back_whatever_happens():
    model = TINY["olmoe"]()
    before = model.config._experts_implementation
    with contextlib.suppress(KeyboardInterrupt), experts_implementation(model, "eager"):
        assert model.config._experts_implementation == "eager"
        raise KeyboardInterrupt
    assert model.config._experts_implementation == before
