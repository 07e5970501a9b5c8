import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification

from models import vmoe
from models.vmoe.configuration import VMoeConfig
from models.vmoe.losses import auxiliary_loss, importance_loss, load_loss
from models.vmoe.modeling import VMoeForImageClassification, VMoeMlp, VMoeSparseMlp
from tests.same_model import assert_same_model

TEN_CLASSES = {label: str(label) for label in range(10)}
EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = VMoeConfig(hidden_size=32, intermediate_size=48, id2label=TEN_CLASSES)
    model = VMoeForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:  # biases that are not zero, routers that decide
                parameter.copy_(torch.randn_like(parameter) / 4)
    return model


@pytest.fixture
def pixel_values():
    return torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def sparse_mlp(model):
    return model.layers[1].mlp


def tokens(count=40, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2))


def test_every_second_block_has_experts(model):
    assert [type(layer.mlp) for layer in model.layers] == [VMoeMlp, VMoeSparseMlp, VMoeMlp, VMoeSparseMlp]


def test_the_shipped_architecture_has_the_announced_size():
    config = VMoeConfig(id2label=TEN_CLASSES)
    assert VMoeForImageClassification(config).num_parameters() == 424_522
    assert (config.num_patches, config.num_experts, config.num_experts_per_tok) == (16, 8, 2)


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "the router selects 3 of 2 experts"),
        ({"num_experts_per_tok": 0}, "the router selects 0 of 8 experts"),
        ({"num_attention_heads": 3}, "3 heads do not share 64 channels evenly"),
        ({"moe_every": 0}, "moe_every is 0, expected at least 1"),
        ({"patch_size": 0}, "patch_size is 0, expected at least 1"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4, expected at least 1"),
        ({"moe_layers": [1, 4]}, "experts are in blocks [4], but there are 4 blocks"),
    ],
)
def test_an_impossible_architecture_is_refused(sizes, what):
    with pytest.raises(StrictDataclassClassValidationError) as refusal:
        VMoeConfig(**sizes)
    assert str(refusal.value.__cause__) == what


def test_a_saved_model_loads_with_the_auto_classes(model, pixel_values, tmp_path):
    vmoe.register()
    vmoe.register()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, VMoeForImageClassification)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert_same_model(loaded, model, lambda each: each(pixel_values).logits)


@pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
def test_every_experts_implementation_computes_the_gated_sum(model, implementation):
    model.set_experts_implementation(implementation)
    experts, router = sparse_mlp(model).experts, sparse_mlp(model).router
    assert experts.config._experts_implementation == implementation
    hidden_TH = tokens()
    _, gates_TK, ids_TK = router(hidden_TH)
    up_TKF = torch.einsum("th,tkfh->tkf", hidden_TH, experts.up_proj[ids_TK]) + experts.up_proj_bias[ids_TK]
    activated_TKF = functional.gelu(up_TKF)
    down_TKH = torch.einsum("tkf,tkhf->tkh", activated_TKF, experts.down_proj[ids_TK]) + experts.down_proj_bias[ids_TK]
    expected_TH = (gates_TK[..., None] * down_TKH).sum(dim=1)
    torch.testing.assert_close(experts(hidden_TH, ids_TK, gates_TK), expected_TH, rtol=1e-5, atol=1e-5)


def test_all_experts_implementations_give_the_same_logits(model, pixel_values):
    logits = {}
    for implementation in EXPERTS_IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        logits[implementation] = model(pixel_values).logits
    torch.testing.assert_close(logits["batched_mm"], logits["eager"], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits["grouped_mm"], logits["eager"], rtol=0, atol=1e-5)


def test_gates_are_probabilities_over_all_experts_and_are_not_renormalised(model):
    router, hidden_TH = sparse_mlp(model).router, tokens()
    logits_TE, gates_TK, ids_TK = router(hidden_TH)
    probabilities_TE = torch.softmax(hidden_TH @ router.weight.T, dim=-1)
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(gates_TK, probabilities_TE.gather(1, ids_TK))
    torch.testing.assert_close(gates_TK, probabilities_TE.sort(descending=True).values[:, : router.top_k])
    assert gates_TK.sum(dim=-1).max() < 0.999


def test_the_router_computes_in_float32_whatever_the_model_is(model):
    router = sparse_mlp(model.to(torch.bfloat16)).router
    hidden_TH = tokens().to(torch.bfloat16)
    logits_TE, gates_TK, _ = router(hidden_TH)
    torch.testing.assert_close(logits_TE, hidden_TH.float() @ router.weight.float().T)
    assert gates_TK.dtype == torch.bfloat16


def test_no_token_is_dropped_when_all_choose_the_same_experts(model):
    mlp = sparse_mlp(model)
    hidden_BPH = tokens(count=1).expand(64, 32).reshape(4, 16, 32)
    mixed_BPH, _ = mlp(hidden_BPH)
    torch.testing.assert_close(mixed_BPH, mixed_BPH[:1, :1].expand(4, 16, 32))
    assert mixed_BPH.abs().max() > 0


def test_noise_is_added_to_the_logits_in_training_only(model):
    router, hidden_TH = sparse_mlp(model).router, tokens(count=20_000)
    clean_TE = router.logits(hidden_TH)
    assert torch.equal(router(hidden_TH)[0], clean_TE)
    noise_TE = router.train()(hidden_TH)[0] - clean_TE
    assert noise_TE.std().item() == pytest.approx(1 / 8, rel=0.01)
    assert noise_TE.mean().item() == pytest.approx(0, abs=0.001)


def test_auxiliary_losses_are_zero_for_equal_experts_and_e_minus_1_for_a_single_one():
    equal_TE, single_TE = torch.zeros(6, 4), torch.tensor([[100.0, 0, 0, 0]]).expand(6, 4)
    assert importance_loss(equal_TE).item() == 0
    assert importance_loss(single_TE).item() == pytest.approx(3)
    assert load_loss(equal_TE, equal_TE, 0.25, top_k=1).item() == 0
    # its own threshold passes with probability 1/2, the others never: (1/2, 0, 0, 0)
    assert load_loss(single_TE, single_TE, 0.25, top_k=1).item() == pytest.approx(3)


def test_load_loss_is_that_of_the_paper():
    logits_TE = torch.tensor([[0.3, 0.1, -0.2], [0.0, 0.4, 0.2]])
    noisy_TE = logits_TE + torch.tensor([[0.1, -0.1, 0.2], [0.0, 0.1, -0.1]])
    normal = torch.distributions.Normal(0, 1)
    selected_E = (1 - normal.cdf((torch.tensor([[0.0], [0.1]]) - logits_TE) / 0.5)).mean(dim=0)
    expected = (selected_E.std(correction=0) / selected_E.mean()) ** 2
    torch.testing.assert_close(load_loss(logits_TE, noisy_TE, 0.5, top_k=2), expected)
    mean = (expected + importance_loss(logits_TE)) / 2
    torch.testing.assert_close(auxiliary_loss(logits_TE, noisy_TE, 0.5, top_k=2), mean)


def test_the_training_loss_adds_the_auxiliary_loss_and_reaches_every_parameter(model, pixel_values):
    labels = torch.tensor([0, 1, 2, 3, 4])
    output = model.train()(pixel_values, labels)
    entropy = functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(output.loss, entropy + model.config.router_aux_loss_coef * output.aux_loss)
    torch.autograd.backward(output.loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert sparse_mlp(model).router.weight.grad.abs().max() > 0


def test_the_loss_outside_training_is_the_cross_entropy(model, pixel_values):
    labels = torch.tensor([0, 1, 2, 3, 4])
    output = model(pixel_values, labels)
    assert output.aux_loss is None
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, labels))
    assert list(model(pixel_values).keys()) == ["logits"]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_torch_exports_it_to_onnx_with_a_dynamic_batch(model, pixel_values, tmp_path):
    model.set_experts_implementation("batched_mm")
    program = torch.onnx.export(
        model, (pixel_values,), dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (pixel_values, pixel_values[:1], pixel_values.repeat(3, 1, 1, 1)):
        (logits,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        np.testing.assert_allclose(logits, model(batch).logits.detach().numpy(), rtol=0, atol=1e-5)
