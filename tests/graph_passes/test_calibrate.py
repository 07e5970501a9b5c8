"""An ONNX model is calibrated as the checkpoint that it was exported from."""

from typing import Any

import numpy as np
import onnx
import pytest

from graph_passes.calibrate import calibrate
from graph_passes.optimize import optimize
from moe_spec.calibration import Shards, shards_of
from moe_spec.errors import UserError, VerificationError
from moe_spec.files import sha256_file
from moe_spec.identity import checkpoint_sha256, onnx_sha256
from moe_spec.manifest import FILE_NAME
from moe_spec.statistics import KEYS, Statistics
from pruning.calibrate import calibrate as calibrate_checkpoint
from pruning.options import PlanOptions
from pruning.plan import plan
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.graph_passes.block_models import plan as plan_of
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import saved
from tests.heard import Heard
from tests.models_table import TINY
from tests.zoo import RUNNER

SEEN = {
    "tokens",
    "probability",
    "gate",
    "gate_squared",
    "output_norm",
    "output_norm_squared",
    "gated_norm",
    "gated_norm_squared",
    "logit_gram",
}


def task(name, directory, examples=5, padded=True):
    """An .npz for the tiny model ``name``; of its texts the first has padding."""
    random, path = np.random.default_rng(0), directory / f"{name}.npz"
    if TINY[name]().main_input_name == "pixel_values":
        np.savez(path, pixel_values=random.standard_normal((examples, 1, 12, 12), dtype=np.float32))
        return path
    arrays: dict[str, Any] = {"input_ids": random.integers(0, 128, (examples, 6), dtype=np.int32)}
    if padded:
        arrays["attention_mask"] = (np.arange(6) < 6 - np.arange(examples)[:, None]).astype(np.int64)
    np.savez(path, **arrays)
    return path


def assert_same(mine, theirs):
    """What an ONNX graph shows is what torch saw, to single precision."""
    for ours, other in zip(mine, theirs, strict=True):
        names = [(layer.name, layer.experts, layer.top_k, layer.token_count, layer.groups) for layer in (ours, other)]
        assert names[0] == names[1]
        assert ours.sums.keys() == SEEN
        for key in SEEN:
            assert ours[key].dtype == np.float64
            np.testing.assert_allclose(ours[key], other[key], rtol=1e-4, atol=1e-4, err_msg=key)
        np.testing.assert_array_equal(ours["tokens"], other["tokens"])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "vmoe"])
def test_an_export_is_calibrated_as_its_checkpoint_and_pruned_by_it(name, zoo, tmp_path):
    data, out, made = task(name, tmp_path), tmp_path / "onnx.safetensors", tmp_path / "plan.json"
    heard = Heard()
    statistics = calibrate(zoo.exported(name), data, out, RUNNER, batch_size=2, on_progress=heard)
    reference = calibrate_checkpoint(zoo.checkpoint(name), data, tmp_path / "torch.safetensors", batch_size=2)
    assert (statistics.model_sha256, statistics.data_sha256) == (reference.model_sha256, reference.data_sha256)
    assert_same(statistics.layers, reference.layers)
    assert_same(Statistics.load(out).layers, reference.layers)
    assert heard.counts("calibrating") == [(0, 5), (2, 5), (4, 5), (5, 5)]
    planned = plan(out, PlanOptions(keep=4), made)
    assert planned.model_sha256 == checkpoint_sha256(zoo.checkpoint(name))
    manifest = optimize(zoo.exported(name), tmp_path / "optimized", RUNNER, plan=planned)
    assert [block.keep for block in manifest.blocks] == [layer.keep for layer in planned.layers]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_foreign_model_is_calibrated_under_its_own_identity(zoo, tmp_path):
    foreign, data = zoo.batched_mm("mixtral"), task("mixtral", tmp_path)
    statistics = calibrate(foreign, data, tmp_path / "onnx.safetensors", RUNNER)
    assert statistics.model_sha256 == onnx_sha256(foreign)
    reference = calibrate_checkpoint(zoo.checkpoint("mixtral"), data, tmp_path / "torch.safetensors")
    assert_same(statistics.layers, reference.layers)


def test_without_a_mask_all_tokens_count(zoo, tmp_path):
    data = task("mixtral", tmp_path, padded=False)
    statistics = calibrate(zoo.exported("mixtral"), data, tmp_path / "s.safetensors", RUNNER, limit=3)
    assert [layer.token_count for layer in statistics.layers] == [18, 18]


def test_a_run_goes_on_from_its_last_shard_to_the_byte(zoo, tmp_path, monkeypatch):
    data, whole, out = task("vmoe", tmp_path), tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    calibrate(zoo.exported("vmoe"), data, whole, RUNNER, batch_size=1)

    def interrupted(self, done, layers, keep=Shards.keep):
        keep(self, done, layers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(zoo.exported("vmoe"), data, out, RUNNER, batch_size=1, shard_size=2)
    heard = Heard()
    calibrate(zoo.exported("vmoe"), data, out, RUNNER, batch_size=1, on_progress=heard)
    assert heard.counts("calibrating")[0] == (2, 5)
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {data.name, whole.name, out.name}


def block_task(spec, directory, **arrays):
    """Data for the graph of one MoE block."""
    path, random = directory / "data.npz", np.random.default_rng(0)
    np.savez(path, **(arrays or {"x": random.standard_normal((7, spec.hidden)).astype(np.float32)}))
    return path


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("sparsemixer", {"probability"}),
        ("llama4", {"output_norm", "output_norm_squared", "gated_norm", "gated_norm_squared"}),
    ],
)
def test_what_cannot_be_seen_is_left_out(kind, missing, tmp_path):
    spec = spec_of("stacked", kind)
    statistics = calibrate(saved(spec, tmp_path), block_task(spec, tmp_path), tmp_path / "s.safetensors", RUNNER)
    assert statistics.layers[0].sums.keys() == SEEN - missing
    lacking = sorted(missing)[0]
    with pytest.raises(UserError) as caught:
        statistics.layers[0][lacking]
    what = f"the statistics of layer {statistics.layers[0].name} lack {lacking!r}: {KEYS[lacking].what}"
    assert (caught.value.what, caught.value.hint) == (what, "moe-edge calibrate on the checkpoint")


@pytest.mark.parametrize(
    ("arrays", "what", "hint"),
    [
        ({"y": np.zeros((3, 8), np.float32)}, "holds the array 'y', which the model does not take", "known: x"),
        (
            {"x": np.zeros((3, 9), np.float32)},
            ": x are float32[3, 9], expected float32[tokens, {hidden}]",
            "store them as the model takes them, or store uint8 `images`",
        ),
        (
            {"x": np.zeros((3, 8), np.int64)},
            ": x are int64[3, 8], expected float32[tokens, {hidden}]",
            "store them as the model takes them, or store uint8 `images`",
        ),
    ],
)
def test_data_that_does_not_fit_the_graph_is_refused(arrays, what, hint, tmp_path):
    spec = spec_of("stacked")
    data = block_task(spec, tmp_path, **arrays)
    with pytest.raises(UserError) as caught:
        calibrate(saved(spec, tmp_path), data, tmp_path / "s.safetensors", RUNNER)
    space = "" if what.startswith(":") else " "
    assert caught.value.what == f"{data}{space}{what.format(hidden=spec.hidden)}"
    assert caught.value.hint == hint


def test_a_missing_input_is_refused(zoo, tmp_path):
    data = tmp_path / "data.npz"
    np.savez(data, attention_mask=np.ones((2, 3), np.int64))
    with pytest.raises(UserError) as caught:
        calibrate(zoo.exported("mixtral"), data, tmp_path / "s.safetensors", RUNNER)
    assert caught.value.what == f"{data} lacks the array 'input_ids'"
    assert caught.value.hint == "store the model's input as 'input_ids'"


def test_a_model_without_routers_left_is_refused(tmp_path):
    spec = spec_of("batched_mm", "softmax_renormalised")
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "one", RUNNER, plan=plan_of(spec, (5,), onnx_sha256(source)))
    with pytest.raises(UserError) as caught:
        calibrate(tmp_path / "one", block_task(spec, tmp_path), tmp_path / "s.safetensors", RUNNER)
    assert caught.value.what == f"{tmp_path / 'one' / 'model.onnx'} has one expert in each layer, nothing is routed"
    assert caught.value.hint == "calibrate the checkpoint, or the ONNX file that this one was made from"


def test_an_op_that_does_not_run_here_is_refused(tmp_path):
    spec = spec_of("trt_moe", "softmax_renormalised")
    source = saved(spec, tmp_path)
    with pytest.raises(UserError) as caught:
        calibrate(source, block_task(spec, tmp_path), tmp_path / "s.safetensors", RUNNER)
    assert caught.value.what.startswith(f"{source} cannot be proven here: ONNX Runtime does not run TRT_MoE ")
    assert caught.value.hint == "calibrate the checkpoint, or the ONNX file that this one was made from"


def test_a_graph_of_a_fixed_batch_is_fed_so_or_refused(tmp_path):
    spec = spec_of("stacked")
    source, data = saved(spec, tmp_path), block_task(spec, tmp_path)
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(model, source)
    with pytest.raises(UserError) as caught:
        calibrate(source, data, tmp_path / "s.safetensors", RUNNER)
    assert caught.value.what == f"{source} takes exactly 3 examples at once, not 7 in batches of 32"
    assert caught.value.hint == "--batch-size 3 --limit 6, or export it with a dynamic axis"
    statistics = calibrate(source, data, tmp_path / "s.safetensors", RUNNER, batch_size=3, limit=6)
    assert statistics.layers[0].token_count == 6


def test_an_input_that_is_no_batch_is_refused(tmp_path):
    spec = spec_of("stacked")
    source, data = saved(spec, tmp_path), block_task(spec, tmp_path)
    model = onnx.load(source)
    model.graph.input.append(onnx.helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, []))
    onnx.save(model, source)
    with pytest.raises(UserError) as caught:
        calibrate(source, data, tmp_path / "s.safetensors", RUNNER)
    assert (caught.value.what, caught.value.hint) == (
        f"{source} takes the single number 'scale', and data has one for each example",
        "export the model with that number in it",
    )


def test_a_mask_that_does_not_tell_tokens_apart_is_refused(tmp_path):
    spec = spec_of("stacked")
    source, out = saved(spec, tmp_path), tmp_path / "s.safetensors"
    model = onnx.load(source)
    model.graph.input.append(onnx.helper.make_tensor_value_info("attention_mask", onnx.TensorProto.INT64, ["n", 2]))
    onnx.save(model, source)
    x, mask_T2 = np.zeros((7, spec.hidden), np.float32), np.ones((7, 2), np.int64)
    data = block_task(spec, tmp_path, x=x, attention_mask=mask_T2)
    with pytest.raises(UserError) as caught:
        calibrate(source, data, out, RUNNER)
    assert caught.value.what == f"{data}: attention_mask has 14 entries in a batch of which the experts see 7 tokens"
    assert caught.value.hint == "padding cannot be told from other tokens here; calibrate the checkpoint"
    assert not out.exists()


def test_half_precision_is_fed_and_summed(tmp_path):
    spec = spec_of("batched_mm", "softmax_renormalised", dtype="float16")
    statistics = calibrate(saved(spec, tmp_path), block_task(spec, tmp_path), tmp_path / "s.safetensors", RUNNER)
    layer = statistics.layers[0]
    assert layer["tokens"].sum() == 7 * spec.top_k
    np.testing.assert_allclose(layer["gate"].sum(), 7, rtol=1e-2)  # each token's weights add up to 1
    np.testing.assert_allclose(layer["probability"].sum(), 7, rtol=1e-6)


def test_shards_of_another_graph_of_the_same_checkpoint_are_refused(zoo, tmp_path, monkeypatch):
    data, out = task("vmoe", tmp_path), tmp_path / "s.safetensors"
    optimize(zoo.exported("vmoe"), tmp_path / "dense", RUNNER, form="dense", prove=False)

    def killed(self, done, layers, keep=Shards.keep):
        keep(self, done, layers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(zoo.exported("vmoe"), data, out, RUNNER, batch_size=2, shard_size=2)
    with pytest.raises(UserError) as caught:
        calibrate(tmp_path / "dense", data, out, RUNNER, batch_size=2)
    theirs, mine = ({"onnx": sha256_file(path / FILE_NAME)} for path in (zoo.exported("vmoe"), tmp_path / "dense"))
    assert caught.value.what == (
        f"{shards_of(out)} holds the shards of a run with options {theirs}, this one has {mine}"
    )


class WrongOnExperts(OnnxRuntimeRunner):
    """Moves what experts.onnx computes."""

    def run(self, model, batches, outputs=None):
        results = super().run(model, batches, outputs)
        return (
            [{name: value + 1 for name, value in row.items()} for row in results]
            if "experts" in model.name
            else results
        )


def test_a_variant_that_computes_something_else_is_never_asked(tmp_path):
    spec = spec_of("stacked")
    with pytest.raises(VerificationError, match=r"output 'out' of experts.onnx differs from that of model.onnx"):
        calibrate(
            saved(spec, tmp_path), block_task(spec, tmp_path), tmp_path / "s.safetensors", WrongOnExperts(threads=1)
        )
    assert not (tmp_path / "s.safetensors").exists()
