"""experts.onnx: its outputs are what numpy computes, whatever form the layer has; the model stays what it is."""

import numpy as np
import onnx
import pytest

from benchmarks.masked import MASKED
from graph_passes.optimize import optimize
from graph_passes.variants.observe_experts import EXPERTS
from graph_passes.weights.stored import place_in
from moe_spec.errors import UserError, VerificationError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL, OBSERVED, Manifest
from moe_spec.runner import Arrays, error_between
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.graph_passes.block_models import NAME, Spec, plan, weights, why_not, why_not_run
from tests.graph_passes.block_models.kinds import FORM_NAMES, spec_of
from tests.graph_passes.block_models.reference.experts import one_expert
from tests.graph_passes.block_models.reference.routing import route
from tests.graph_passes.readers.proofs import ALL, THREE, TOLERANCE, saved
from tests.zoo import RUNNER

TOKENS = 7
TWO = (1, 4)
KINDS = (
    "softmax_renormalised",
    "sigmoid_bias_groups",
    "topk_first",
    "switch_capacity",
    "softmax_groups",
    "sparsemixer",
    "vmoe",
    "llama4",
)
SPECS = [
    pytest.param(spec_of(form, kind), id=f"{form} {kind}")
    for form in FORM_NAMES
    for kind in KINDS
    if why_not(spec_of(form, kind)) is None and why_not_run(spec_of(form, kind)) is None and form != "qmoe"
]
LAYER = ("logits", "ids", "weights", "norms")


def observed(spec: Spec, folder, keep=ALL, form: str = "auto") -> Manifest:
    source = saved(spec, folder)
    made = None if keep == ALL else plan(spec, keep, onnx_sha256(source))
    return optimize(source, folder / "out", RUNNER, plan=made, form=form, observe_experts=True)


def tokens(spec: Spec) -> np.ndarray:
    shape = (TOKENS, spec.hidden) if spec.rank == 2 else (2, TOKENS, spec.hidden)
    return np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)


def run(manifest: Manifest, folder, x: np.ndarray) -> tuple[Arrays, list[Arrays]]:
    """All outputs of experts.onnx by name, and what was observed, layer by layer."""
    got = RUNNER.run(folder / "out" / EXPERTS, [{"x": x}])[0]
    layers = [dict(zip(LAYER, names, strict=True)) for names in manifest.details["experts"].values()]
    return got, [{label: got[name] for label, name in layer.items()} for layer in layers]


def assert_as_computed(spec: Spec, keep: tuple[int, ...], x: np.ndarray, found: Arrays) -> None:
    """The four values of the only layer are those of the reference."""
    tensors = {name: array.astype(np.float64) for name, array in weights(spec).items()}
    hidden = x.astype(np.float64).reshape(-1, spec.hidden)
    choices = route(spec, tensors, hidden, keep, sequence=x.shape[-2])
    top_k, tolerance = min(spec.top_k, len(keep)), TOLERANCE[spec.dtype]
    assert found["ids"].shape == found["weights"].shape == found["norms"].shape == (len(hidden), top_k)
    assert [found[label].dtype for label in LAYER] == [np.float32, np.int64, np.float32, np.float32]
    logits = hidden @ tensors["router"].T + (tensors["router_bias"] if spec.router_bias else 0.0)
    assert error_between(logits[:, list(keep)], found["logits"])[1] <= tolerance
    ids = np.asarray(keep)[found["ids"]]
    shares = np.array([[choice.get(i, 0.0) for i in row] for choice, row in zip(choices, ids, strict=True)])
    assert all(set(choice) <= set(row.tolist()) for choice, row in zip(choices, ids, strict=True))
    assert all(len(set(row.tolist())) == top_k for row in ids)
    assert error_between(shares, found["weights"])[1] <= tolerance
    read = hidden[:, None] * (shares[..., None] if spec.weights_on == "input" else np.ones((*ids.shape, 1)))
    norms = [
        [np.linalg.norm(one_expert(spec, tensors, read[t, slot], ids[t, slot])) for slot in range(top_k)]
        for t in range(len(hidden))
    ]
    assert error_between(np.array(norms), found["norms"])[1] <= tolerance


def assert_beside(manifest: Manifest, folder, x: np.ndarray, got: Arrays, found: Arrays) -> None:
    """The model gives what it gives without, and observed.onnx has the same weights as gates."""
    out = folder / "out"
    for name, value in RUNNER.run(out / MODEL, [{"x": x}])[0].items():
        assert error_between(value, got[name])[1] <= TOLERANCE[value.dtype.name]
    assert manifest.blocks[0].gates is not None
    gates = RUNNER.run(out / OBSERVED, [{"x": x}])[0][manifest.blocks[0].gates]
    spread = np.zeros_like(gates)
    np.put_along_axis(spread, found["ids"], found["weights"], axis=1)
    assert error_between(gates, spread)[1] <= TOLERANCE[x.dtype.name]
    assert error_between(gates.sum(axis=0), spread.sum(axis=0))[1] <= TOLERANCE[x.dtype.name]
    Manifest.load(out).check_files(out)


def assert_observed(spec: Spec, folder, keep=ALL, form: str = "auto") -> Manifest:
    manifest, x = observed(spec, folder, keep, form), tokens(spec)
    got, (found,) = run(manifest, folder, x)
    assert_as_computed(spec, keep, x, found)
    assert_beside(manifest, folder, x, got, found)
    return manifest


@pytest.mark.parametrize("spec", SPECS)
def test_every_form_and_router_is_observed(tmp_path, spec):
    manifest = assert_observed(spec, tmp_path)
    assert not manifest.modified
    assert manifest.details["experts"] == {NAME: [f"{NAME}/observed/{label}" for label in LAYER]}


@pytest.mark.parametrize("form", ["sorted", "dense", "gather", "moe"])
def test_what_writers_write_is_observed(tmp_path, form):
    assert_observed(spec_of("batched_mm", "softmax_renormalised"), tmp_path, THREE, form)


@pytest.mark.parametrize("kind", ["softmax_renormalised", "sigmoid_bias_eps", "sigmoid", "topk_first"])
@pytest.mark.parametrize("form", ["batched_mm", "stacked"])
def test_where_nothing_is_ranked_the_ids_are_all_in_order(tmp_path, form, kind):
    spec = spec_of(form, kind)
    manifest, x = observed(spec, tmp_path, TWO), tokens(spec)
    got, (found,) = run(manifest, tmp_path, x)
    np.testing.assert_array_equal(found["ids"], np.tile([0, 1], (TOKENS, 1)))
    assert_as_computed(spec, TWO, x, found)
    assert_beside(manifest, tmp_path, x, got, found)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("form", ["batched_mm", "grouped", "dispatch"])
def test_before_and_after_reductions_changed_it_works(tmp_path, form, opset):
    assert_observed(spec_of(form, opset=opset), tmp_path)


@pytest.mark.parametrize("form", ["batched_mm", "masked_loop"])
@pytest.mark.parametrize("rank", [2, 3])
def test_half_precision_is_observed_in_single(tmp_path, form, rank):
    assert_observed(spec_of(form, "softmax_renormalised", dtype="float16", rank=rank), tmp_path)


def test_norms_that_half_precision_could_not_square_are_finite(tmp_path):
    spec = spec_of("batched_mm", "topk_first", dtype="float16")  # ranks logits: softmax scores this far apart are 0
    manifest = observed(spec, tmp_path)
    x = tokens(spec) * np.float16(30)
    _, (found,) = run(manifest, tmp_path, x)
    assert found["norms"].max() > 256  # whose square float16 has no number for
    assert_as_computed(spec, ALL, x, found)


@pytest.mark.parametrize("quantization", ["int8", "uint8", "int4", "matmulnbits"])
def test_quantised_experts_are_observed(tmp_path, quantization):
    assert_observed(
        spec_of("masked_loop", quantization=quantization, hidden=32, width=64, opset=21),
        tmp_path,
    )


def test_a_quantised_op_is_observed_where_its_weights_can_be_dequantised(tmp_path):
    assert_observed(spec_of("qmoe", "softmax_renormalised", opset=21), tmp_path)


def test_a_quantised_op_in_an_older_opset_is_refused_by_layer(tmp_path):
    with pytest.raises(UserError) as error:
        observed(spec_of("qmoe", "softmax_renormalised", opset=20), tmp_path)
    assert error.value.what == (
        "weight experts.0.gate of layer layers.0.mlp is quantised to int4, which DequantizeLinear must read in this "
        "type: opset 21 can, the graph has 20"
    )
    assert not (tmp_path / "out").exists()


def test_each_layer_of_several_is_observed(tmp_path):
    spec = spec_of("grouped", layers=3)
    manifest, x = observed(spec, tmp_path), tokens(spec)
    got, layers = run(manifest, tmp_path, x)
    assert list(manifest.details["experts"]) == [f"layers.{index}.mlp" for index in range(3)]
    wanted = RUNNER.run(tmp_path / "out" / MODEL, [{"x": x}])[0]["out"]
    assert error_between(wanted, got["out"])[1] <= 1e-5
    gates = RUNNER.run(tmp_path / "out" / OBSERVED, [{"x": x}])[0]
    for block, found in zip(manifest.blocks, layers, strict=True):
        spread = np.zeros((TOKENS, block.experts), np.float32)
        np.put_along_axis(spread, found["ids"], found["weights"], axis=1)
        assert error_between(gates[str(block.gates)], spread)[1] <= 1e-5


def test_a_plain_ffn_has_no_outputs(tmp_path):
    manifest = observed(spec_of("batched_mm", "softmax_renormalised"), tmp_path, (5,))
    assert [block.form for block in manifest.blocks] == ["ffn"]
    assert manifest.details["experts"] == {}
    assert {value.name for value in onnx.load(tmp_path / "out" / EXPERTS).graph.output} == {"out"}


@pytest.mark.parametrize("form", ["gather", "sorted"])
def test_weights_that_lie_expert_by_expert_are_shared(tmp_path, form):
    spec = spec_of("batched_mm", "softmax_renormalised", hidden=32, width=48)
    observed(spec, tmp_path, THREE, form)
    model = onnx.load(tmp_path / "out" / EXPERTS, load_external_data=False)
    places = {
        tensor.name: next(entry.value for entry in tensor.external_data if entry.key == "location")
        for tensor in model.graph.initializer
        if tensor.external_data and "experts" in tensor.name
    }
    assert len(places) == 3 * len(THREE)
    assert set(places.values()) == {f"{MODEL}.data"}


def test_the_place_of_bytes_is_known_only_where_they_are_one_run_of_the_directory(tmp_path):
    np.arange(60, dtype=np.float32).tofile(tmp_path / "weights")
    stored = np.memmap(tmp_path / "weights", np.float32, mode="r", offset=16, shape=(4, 14))
    assert place_in(tmp_path, stored[1:3]) == ("weights", 16 + 14 * 4)
    assert place_in(tmp_path, stored[2:][1][4:]) == ("weights", 16 + (3 * 14 + 4) * 4)
    assert place_in(tmp_path, stored.T) is None
    assert place_in(tmp_path, stored[1:3] + 1) is None
    assert place_in(tmp_path, stored[[1, 2]]) is None
    assert place_in(tmp_path / "elsewhere", stored) is None


def test_rows_of_a_router_without_an_expert_are_refused_by_layer(tmp_path):
    onnx.save(MASKED["stacked.zero_gates"](), tmp_path / "masked.onnx")
    with pytest.raises(UserError) as error:
        optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER, observe_experts=True)
    assert error.value.what == (
        "the experts of layer moe.0 cannot be observed: some rows of its router lead to no expert of their own"
    )
    assert error.value.hint == "leave --observe-experts out; observed.onnx has gates and scores of the other layers"
    assert not (tmp_path / "out").exists()


class WrongOnExperts(OnnxRuntimeRunner):
    """Moves what experts.onnx computes by the whole of its range."""

    def run(self, model, batches, outputs=None):
        results = super().run(model, batches, outputs)
        if model.name != EXPERTS:
            return results
        return [result | {"out": result["out"] + np.abs(result["out"]).max()} for result in results]


def test_a_variant_that_computes_something_else_is_not_written(tmp_path):
    source = saved(spec_of("grouped"), tmp_path)
    said = r"output 'out' of experts.onnx differs from that of model.onnx by 1.00e\+00 of its range"
    with pytest.raises(VerificationError, match=said):
        optimize(source, tmp_path / "out", WrongOnExperts(threads=1), observe_experts=True)
    assert not (tmp_path / "out").exists()


def test_without_a_proof_an_op_that_does_not_run_here_is_observed_all_the_same(tmp_path):
    spec = spec_of("trt_moe", "softmax_renormalised")
    manifest = optimize(saved(spec, tmp_path), tmp_path / "out", RUNNER, observe_experts=True, prove=False)
    x = tokens(spec)
    _, (found,) = run(manifest, tmp_path, x)
    assert_as_computed(spec, ALL, x, found)
