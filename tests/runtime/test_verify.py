import bisect
import dataclasses
import re
from typing import Any

import numpy as np
import onnx
import pytest

from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.manifest import Manifest, TensorSpec, list_files
from runtime.backend import BuildOptions
from runtime.build import build
from runtime.targets import find_target
from runtime.tensorrt.driver import compute_capability_here
from runtime.verification.report import MARGIN_EDGES, ParityReport
from runtime.verification.sides import Side
from runtime.verification.tolerances import TOLERANCES, coarsest
from runtime.verify import verify
from tests.runtime import tiny
from tests.runtime.tiny import Tiny


def compare(tmp_path, candidate, reference, data=None, **options):
    mine, theirs = tmp_path / "reference", tmp_path / "candidate"
    for directory, kind in ((mine, reference), (theirs, candidate)):
        if not directory.exists():
            tiny.write(directory, kind)
    return verify(theirs, mine, data, threads=1, **options)


def task(count=6, seed=1, labels=None):
    return Dataset({"x": tiny.examples(count, seed=seed)}, labels, "data-hash")


def test_a_model_is_equal_to_itself(tmp_path):
    report = compare(tmp_path, Tiny(), Tiny())
    assert (report.passed, report.reasons, report.first_wrong_layer, report.flips) == (True, (), None, 0)
    assert report.data == "random feeds at the shapes 1x1, 2x7, 5x4"
    assert [layer.tokens for layer in report.layers] == [1 + 14 + 20] * 2
    assert [sum(layer.usage) for layer in report.layers] == [35 * tiny.TOP_K] * 2
    assert [(sum(layer.margin_tokens), sum(layer.margin_flips)) for layer in report.layers] == [(35, 0)] * 2
    (logits,) = report.outputs
    assert (logits.examples, logits.max_rel, logits.top1_agreement) == (8, 0.0, 1.0)
    assert logits.esap == pytest.approx(1)
    assert report.reference_sha256 == sha256_file(tmp_path / "reference" / "manifest.json")


@pytest.mark.parametrize(("keep", "dropped"), [((0, 2, 3), (1,)), ((1, 3), (0, 2)), ((2,), (0, 1, 3))])
def test_a_pruned_model_equals_its_parent_with_the_dropped_experts_unselectable(tmp_path, keep, dropped):
    report = compare(tmp_path, Tiny(keep=keep), Tiny(masked=dropped))
    assert (report.passed, report.flips) == (True, 0)
    assert report.outputs[0].max_rel < 1e-5


def test_one_expert_on_both_sides_leaves_nothing_to_flip(tmp_path):
    report = compare(tmp_path, Tiny(keep=(2,)), Tiny(keep=(2,)))
    assert (report.passed, [layer.tokens for layer in report.layers]) == (True, [0, 0])


def test_pruning_is_not_what_the_unmasked_parent_computes(tmp_path):
    report = compare(tmp_path, Tiny(keep=(0, 2, 3)), Tiny())
    assert not report.passed
    assert report.first_wrong_layer == "blocks.0.moe"
    assert report.layers[0].faults == report.layers[0].flips > 0
    assert report.layers[0].agreement < 1


@pytest.mark.parametrize("layer", [0, 1])
def test_a_router_with_its_experts_in_the_wrong_order_is_the_first_wrong_layer(tmp_path, layer):
    report = compare(tmp_path, Tiny(rolled=layer), Tiny(), task(40))
    assert not report.passed
    assert report.first_wrong_layer == tiny.LAYERS[layer]
    assert re.fullmatch(
        rf"layer {re.escape(tiny.LAYERS[layer])}: \d+ of 200 tokens select other experts although the reference's "
        r"choice was clear \(relative margin up to \d\.\de[+-]\d\d, rounding explains 1\.0e-04\)",
        report.reasons[0],
    )


def test_weights_that_are_off_are_seen_where_nothing_flips(tmp_path):
    report = compare(tmp_path, Tiny(head=1.01), Tiny())
    assert (report.flips, report.passed, report.first_wrong_layer) == (0, False, None)
    (reason,) = report.reasons
    assert re.fullmatch(
        r"output logits: differs by 1\.0e-02 of its largest magnitude on the 8 examples without flips, "
        r"allowed 1\.0e-05",
        reason,
    )


def test_an_output_that_is_not_a_number_fails(tmp_path):
    report = compare(tmp_path, Tiny(head=float("nan")), Tiny())
    assert report.reasons == ("output logits: differs by a value that is not finite",)
    assert report.outputs[0].max_rel is report.outputs[0].kl is None


def test_a_half_precision_copy_passes_by_its_own_tolerance_only(tmp_path):
    half = compare(tmp_path, Tiny(dtype="float16"), Tiny(), task(64))
    assert (half.precision, half.tolerance) == ("float16", TOLERANCES["float16"])
    assert half.passed
    strict = compare(tmp_path, Tiny(dtype="float16"), Tiny(), task(64), tolerance=TOLERANCES["float32"])
    assert (strict.precision, strict.passed) == ("as given", False)


def test_a_flip_at_a_narrow_margin_is_excused_and_its_example_left_out(tmp_path):
    """The router's rows of experts 0 and 1 are nearly equal: rounding to half precision decides between them."""
    twins = Tiny(twins=True)
    report = compare(tmp_path, dataclasses.replace(twins, dtype="float16"), twins, task(64))
    assert report.flips > 0
    assert [layer.faults for layer in report.layers] == [0, 0]
    assert report.layers[0].largest_margin < TOLERANCES["float16"].margin
    assert sum(report.layers[0].margin_flips) == report.layers[0].judged_flips > 0
    assert report.layers[0].margin_flips[bisect.bisect(MARGIN_EDGES, TOLERANCES["float16"].margin) + 1 :] == (0, 0)
    assert 0 < report.outputs[0].examples < 64
    assert report.outputs[0].max_rel < TOLERANCES["float16"].element


def test_accuracy_is_that_of_both_models_on_labelled_data(tmp_path):
    tiny.write(tmp_path / "reference")
    data = task(50)
    report = compare(tmp_path, Tiny(keep=(0, 1)), Tiny(), dataclasses.replace(data, labels=np.zeros(50, np.int64)))
    logits = {}
    for name in ("reference", "candidate"):
        from runtime.backends import open_session

        with open_session(tmp_path / name) as session:
            logits[name] = session.run(data.feeds)["logits"]
    assert report.accuracy.reference == np.mean(logits["reference"].argmax(1) == 0)
    assert report.accuracy.candidate == np.mean(logits["candidate"].argmax(1) == 0)
    assert report.accuracy.difference == report.accuracy.candidate - report.accuracy.reference
    assert (report.accuracy.examples, report.examples, report.data_sha256) == (50, 50, "data-hash")


def test_the_batch_size_changes_nothing_but_rounding(tmp_path):
    labels = np.arange(10) % 3
    one, all_at_once = (
        compare(tmp_path, Tiny(keep=(0, 1, 2)), Tiny(masked=(3,)), task(10, labels=labels), batch_size=size)
        for size in (1, 10)
    )
    assert one.accuracy == all_at_once.accuracy
    assert (one.passed, one.layers[0].tokens) == (all_at_once.passed, all_at_once.layers[0].tokens) == (True, 50)


def test_an_engine_shows_no_routers_and_the_report_says_so(tmp_path):
    model = tiny.write(tmp_path / "reference")
    build(model, find_target("onnxruntime-cpu"), BuildOptions(), tmp_path / "candidate")
    report = verify(tmp_path / "candidate", model, threads=1)
    assert (report.passed, report.layers, report.flips) == (True, None, None)
    assert report.notes == (
        "the candidate is an engine, which shows no routers: no flips were looked for, all examples were compared",
    )


def test_of_an_engine_in_half_precision_examples_that_rounding_may_flip_are_left_out(tmp_path):
    """As if the flips of the twins were seen, which the model itself shows."""
    twins, task_data = Tiny(twins=True), task(400)
    shown = compare(tmp_path, dataclasses.replace(twins, dtype="float16"), twins, task_data)
    assert shown.flips > 0
    build(tmp_path / "candidate", find_target("onnxruntime-cpu"), BuildOptions(), tmp_path / "engine")
    report = verify(tmp_path / "engine", tmp_path / "reference", task_data, threads=1)
    compared = report.outputs[0].examples
    assert (report.passed, report.layers) == (True, None)
    assert 0 < compared < shown.outputs[0].examples
    assert report.notes == (
        "the candidate is an engine, which shows no routers: no flips were looked for, "
        f"{400 - compared} of 400 examples were left out, in which rounding may choose other experts",
    )
    loose = dataclasses.replace(report.tolerance, margin=1e9)
    report = verify(tmp_path / "engine", tmp_path / "reference", task_data, threads=1, tolerance=loose)
    assert (report.passed, report.outputs[0].examples) == (False, 400)
    assert report.notes == (
        "the candidate is an engine, which shows no routers: no flips were looked for, "
        "all examples were compared, in each of which rounding may choose other experts",
    )


def test_an_engine_may_be_the_reference_too(tmp_path):
    model = tiny.write(tmp_path / "candidate")
    build(model, find_target("onnxruntime-cpu"), BuildOptions(), tmp_path / "reference")
    report = verify(model, tmp_path / "reference", threads=1)
    assert (report.passed, report.layers, report.outputs[0].max_rel) == (True, None, 0)
    assert report.notes == (
        "the reference is an engine, which shows no routers: no flips were looked for, all examples were compared",
    )


@pytest.mark.skipif(compute_capability_here() is not None, reason="there is a GPU here")
def test_a_tensorrt_engine_is_not_verified_without_its_gpu(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    model = tiny.write(tmp_path / "reference")
    build(model, find_target("sm89"), BuildOptions(), tmp_path / "engine")
    with pytest.raises(UserError, match=r"running it needs a GPU of compute capability 8\.9"):
        verify(tmp_path / "engine", model)


@pytest.mark.parametrize("kind", [Tiny(keep=(0, 2, 3)), Tiny(keep=(1,)), Tiny(head=float("nan"))], ids=str)
def test_a_report_is_the_same_after_a_round_trip(tmp_path, kind):
    report = compare(tmp_path, kind, Tiny(), task(labels=np.zeros(6, np.int64)))
    report.save(tmp_path / "parity.json")
    assert ParityReport.load(tmp_path / "parity.json") == report


def test_a_report_of_an_engine_is_the_same_after_a_round_trip(tmp_path):
    model = tiny.write(tmp_path / "reference")
    build(model, find_target("cpu"), BuildOptions(), tmp_path / "engine")
    report = verify(tmp_path / "engine", model)
    report.save(tmp_path / "parity.json")
    assert ParityReport.load(tmp_path / "parity.json") == report


def test_a_report_that_was_cut_is_refused(tmp_path):
    compare(tmp_path, Tiny(), Tiny()).save(tmp_path / "parity.json")
    text = (tmp_path / "parity.json").read_text()
    (tmp_path / "parity.json").write_text(text[: len(text) // 2])
    with pytest.raises(
        UserError, match=r"parity.json is no complete JSON: .*\nhint: make it again with `moe-edge verify`$"
    ):
        ParityReport.load(tmp_path / "parity.json")


def test_wrong_feeds_are_named(tmp_path):
    tiny.write(tmp_path / "reference")
    message = "test.npz: inputs are y, expected x\nhint: name the arrays like the model's inputs"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        compare(tmp_path, Tiny(), Tiny(), Dataset({"y": tiny.examples(2)}, None, "", "test.npz"))


def test_models_that_are_not_comparable_are_refused(tmp_path):
    message = (
        f"layer blocks.0.moe of {tmp_path}/candidate has the experts [3], which its reference lacks\n"
        "hint: give the model that the candidate was made from as --reference"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        compare(tmp_path, Tiny(keep=(0, 3)), Tiny(keep=(0, 1)))


def test_outputs_of_other_widths_are_refused(tmp_path):
    message = (
        f"output logits of {tmp_path}/candidate is [1, 5], that of its reference [1, 3]\n"
        "hint: give the model that the candidate was made from as --reference"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        compare(tmp_path, Tiny(classes=5), Tiny())


def test_a_scalar_output_is_compared_like_any_other(tmp_path):
    for name in ("reference", "candidate"):
        with_scalar(tiny.write(tmp_path / name))
    report = compare(tmp_path, Tiny(), Tiny())
    assert (report.passed, [output.name for output in report.outputs]) == (True, ["logits", "aux_loss"])


def with_scalar(directory):
    """The sum of all logits as a further output."""
    for name in ("model.onnx", "observed.onnx"):
        model = onnx.load(directory / name, load_external_data=False)
        model.graph.node.append(onnx.helper.make_node("ReduceSum", ["logits"], ["aux_loss"], keepdims=0))
        model.graph.output.append(onnx.helper.make_tensor_value_info("aux_loss", onnx.TensorProto.FLOAT, []))
        onnx.save(model, directory / name)
    manifest = Manifest.load(directory)
    outputs = (*manifest.outputs, TensorSpec("aux_loss", "float32", ()))
    (directory / "manifest.json").unlink()
    dataclasses.replace(manifest, files=list_files(directory), outputs=outputs).save(directory)


@dataclasses.dataclass
class Embedded:
    """A decoder with a cache that takes what its tokens mean, not their ids."""

    inputs: tuple[TensorSpec, ...] = (
        TensorSpec("inputs_embeds", "float32", ("batch", "sequence", 4)),
        TensorSpec("past_key_values.0.key", "float32", ("batch", 1, "past", 4)),
    )
    outputs: tuple[TensorSpec, ...] = (TensorSpec("logits", "float32", ("batch", "sequence", 4)),)

    def run(self, feeds, _outputs=None):
        return {"logits": feeds["inputs_embeds"]}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_a_decoder_that_takes_no_ids_writes_no_text(tmp_path):
    session: Any = Embedded()
    manifest = Manifest("optimized", tiny.SOURCE, tiny.SOURCE, (), session.inputs, session.outputs)
    side = Side(tmp_path, manifest, session, observed=True)
    report = verify(side, side, tolerance=TOLERANCES["float32"])
    assert (report.passed, report.greedy) == (True, None)
    assert report.notes == (
        "no texts were compared: the model takes inputs_embeds, past_key_values.0.key and gives logits: it generates "
        "no text",
    )


def test_layers_of_other_names_are_refused(tmp_path):
    path = tiny.write(tmp_path / "candidate") / "manifest.json"
    path.write_text(path.read_text().replace("blocks.1.moe", "encoder.1"))
    message = (
        f"{tmp_path}/candidate has the MoE layers blocks.0.moe, encoder.1, its reference blocks.0.moe, blocks.1.moe\n"
        "hint: give the model that the candidate was made from as --reference"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        compare(tmp_path, Tiny(), Tiny())


def test_a_missing_or_damaged_side_is_named(tmp_path):
    model = tiny.write(tmp_path / "model")
    message = (
        f"{tmp_path}/no is no model or engine directory\n"
        "hint: give a directory that `moe-edge export`, `optimize` or `build` wrote"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        verify(tmp_path / "no", model)
    (model / "observed.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"observed\.onnx has 0 bytes, manifest\.json says"):
        verify(model, model)


def test_a_format_without_a_tolerance_is_refused():
    message = (
        "there is no element tolerance for float8e5m2\n"
        "hint: choose the format to judge by: --precision fp32, fp16, bf16, int8, fp8, w8a8, nvfp4, int4"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        coarsest(["float32", "float8e5m2"])
