import json
import re
import shutil
from typing import Any

import onnx
import onnx.parser
import pytest

from graph_passes.readers import READERS
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import Manifest
from moe_spec.plan import SCHEMA as PLAN_SCHEMA
from moe_spec.plan import PruningPlan
from moe_spec.record import save_record
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from runtime.targets import TARGETS
from tests.cli.helpers import invoke, leftovers
from tests.graph_passes.block_models import NAME, Spec, save

NO_ONNX = "give a file that torch.onnx, `moe-edge export` or another exporter wrote"

DENSE = """
<ir_version: 10, opset_import: ["" : 20]>
dense (float[tokens, 4] x) => (float[tokens, 4] y) <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{ h = MatMul(x, w)  y = Relu(h) }
"""
ODD = """
<ir_version: 10, opset_import: ["" : 20]>
odd (float[tokens, 2] x) => (float[tokens, 2] y)
<float[2, 3] router = {1, 2, 3, 4, 5, 6}, float[3, 2, 2] experts = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2},
 int64[1] k = {1}, int64[1] axis = {1}>
{
   logits = MatMul(x, router)
   scores = Softmax<axis = 1>(logits)
   [choice] gates, ids = TopK<axis = 1>(scores, k)
   chosen = Gather(experts, ids)
   row = Unsqueeze(x, axis)
   column = Unsqueeze(row, axis)
   product = MatMul(column, chosen)
   flat = Squeeze(product, axis)
   one = Squeeze(flat, axis)
   y = Mul(one, gates)
}
"""
KNOWN = {name for target in TARGETS for name in (target.name, *target.aliases)}
NOT_RECOGNISED = "--allow-partial leaves these layers as they are"


def refusal(what, hint):
    return 1, "", f"error: {what}\nhint: {hint}\n"


@pytest.fixture
def block(tmp_path):
    """One MoE layer of a foreign exporter: 8 experts, K=2."""
    path = tmp_path / "block.onnx"
    save(Spec(), path)
    return path


def write(text, path):
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def plan_for(block, **layer):
    fields: dict[str, Any] = {"name": NAME, "experts": 8, "top_k": 2, "keep": (0, 2, 5)} | layer
    path = block.with_name("plan.json")
    PruningPlan(onnx_sha256(block), "by hand", (LayerPlan(**fields),)).save(path)
    return path


# --- what it does ---------------------------------------------------------------------------------------------------


def test_a_plan_is_applied_and_proven(block, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = invoke("optimize", block, "--plan", plan_for(block), "--target", "sm89", "-o", out)
    assert (code, stderr) == (0, "")
    size = Manifest.load(out).blocks[0].bytes
    assert re.fullmatch(rf"{out}: proven to \d\.\de[+-]\d\d\n  {NAME}: 3 experts, K=2, dense, {size:,} bytes\n", stdout)


def test_without_a_proof_the_summary_says_so(block, tmp_path):
    code, stdout, _ = invoke("optimize", block, "--form", "gather", "--no-prove", "-o", tmp_path / "out")
    assert code == 0
    assert stdout.startswith(f"{tmp_path / 'out'}: not proven (--no-prove)\n  {NAME}: 8 experts, K=2, gather, ")


def test_json_holds_the_manifest(zoo, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = invoke("optimize", zoo.exported("vmoe"), "--target", "onnxruntime-cpu", "-o", out, "--json")
    assert (code, stderr) == (0, "")
    payload = json.loads(stdout)
    assert payload.pop("modified")
    assert payload == json.loads(json.dumps(Manifest.load(out).to_json()))
    assert {block["form"] for block in payload["blocks"]} == {"sorted"}


def test_what_nobody_asked_to_change_stays_byte_for_byte(block, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = invoke("optimize", block, "-o", out)
    assert (code, stderr) == (0, "")
    assert stdout.startswith(f"{out}: proven to 0.0e+00; nothing had to change\n")
    assert (out / "model.onnx").read_bytes() == block.read_bytes()
    assert not json.loads(invoke("optimize", block, "-o", tmp_path / "again", "--json")[1])["modified"]


def test_k_shrinks_only_when_asked(block, tmp_path):
    plan = tmp_path / "plan.json"
    made = PruningPlan(onnx_sha256(block), "by hand", (LayerPlan("layers.0.mlp", 8, 1, (5,)),)).to_json()
    made["layers"][0]["top_k"] = 2
    save_record(plan, "plan", PLAN_SCHEMA, made)
    assert invoke("optimize", block, "--plan", plan, "-o", tmp_path / "out") == refusal(
        "layer layers.0.mlp keeps 1 of 8 experts, but its router selects K=2 a token",
        "keep at least 2: --keep 2; or let K shrink with the layer: --clamp-top-k",
    )
    assert invoke("optimize", block, "--plan", plan, "--clamp-top-k", "-o", tmp_path / "out")[0] == 0
    assert [(entry.experts, entry.top_k) for entry in Manifest.load(tmp_path / "out").blocks] == [(1, 1)]


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path):
    nothing = tmp_path / "nothing.onnx"
    assert invoke("optimize", nothing, "-o", tmp_path / "out") == refusal(
        f"{nothing} does not exist, expected an ONNX file or a model directory", "check the path"
    )
    assert invoke("optimize", tmp_path, "-o", tmp_path / "out") == refusal(
        f"{tmp_path} is no model directory: it has no model.onnx", "give what export or optimize wrote"
    )


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("text.onnx", b"a model", "is no readable ONNX file: Error parsing message with type 'onnx.ModelProto'"),
        ("plan.json", b'{"artifact": "plan"}', "is no readable ONNX file: Error parsing message"),
        ("empty.onnx", b"", "is no ONNX model: its graph has no node"),
    ],
)
def test_what_is_no_onnx_file_is_refused(name, content, what, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    code, stdout, stderr = invoke("optimize", path, "-o", tmp_path / "out")
    assert (code, stdout) == (1, "")
    assert stderr.startswith(f"error: {path} {what}")
    assert stderr.endswith(f"\nhint: {NO_ONNX}\n")
    assert leftovers(tmp_path) == {name}


def test_a_model_without_experts_is_refused(tmp_path):
    dense = write(DENSE, tmp_path / "dense.onnx")
    assert invoke("optimize", dense, "-o", tmp_path / "out") == refusal(
        f"{dense} has no MoE layer", "give a model with routed experts; `moe-edge inspect` shows what it has"
    )


def test_experts_that_no_reader_knows_are_refused_by_every_reader(tmp_path):
    model = write(ODD, tmp_path / "model.onnx")
    said = [f"  {reader.FORM}: no {reader.LOOKS_FOR} follows the router (at TopK 'choice')" for reader in READERS]
    lines = [f"{model}: 1 MoE layer(s) not recognised", "layer at TopK 'choice':", *said]
    assert invoke("optimize", model, "-o", tmp_path / "out") == refusal("\n".join(lines), NOT_RECOGNISED)
    assert leftovers(tmp_path) == {"model.onnx"}


def test_weights_that_are_cut_are_refused(zoo, tmp_path):
    model = shutil.copytree(zoo.exported("vmoe"), tmp_path / "model")
    data = model / "model.onnx.data"
    whole = data.stat().st_size
    with data.open("r+b") as file:
        file.truncate(whole - 8)
    code, stdout, stderr = invoke("optimize", model, "-o", tmp_path / "out")
    assert (code, stdout) == (1, "")
    assert re.fullmatch(
        rf"error: {data} has {whole - 8} bytes, but weight \S+ needs bytes \d+ to \d+: the file is cut\n"
        "hint: copy or export the model again; its weights lie beside the \\.onnx file\n",
        stderr,
    )
    data.unlink()
    code, _, stderr = invoke("optimize", model, "-o", tmp_path / "out")
    assert code == 1
    assert re.match(rf"error: {data} does not exist, but weight \S+ lies in it\n", stderr)
    assert leftovers(tmp_path) == {"model"}


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (
            ("--target", "rtx-adda"),
            "unknown target 'rtx-adda'",
            f"did you mean 'rtx-ada'? known: {', '.join(sorted(KNOWN))}",
        ),
        (
            ("--form", "dence"),
            "unknown form 'dence'",
            "did you mean 'dense'? known: auto, dense, ffn, gather, moe, qmoe, sorted, trt_moe",
        ),
        (
            ("--form", "sorted", "--target", "sm89"),
            "the target does not take form 'sorted'",
            "it takes: dense, gather, ffn",
        ),
        (
            ("--form", "ffn"),
            f"form ffn cannot express layer {NAME}: it has 8 experts, a plain FFN is one",
            "use --form auto, or another form",
        ),
    ],
)
def test_an_impossible_wish_is_refused(options, what, hint, block, tmp_path):
    assert invoke("optimize", block, *options, "-o", tmp_path / "out") == refusal(what, hint)
    assert leftovers(tmp_path) == {"block.onnx"}


def test_a_plan_for_another_model_is_refused_unless_it_is_the_same_one(block, tmp_path):
    plan = plan_for(block)
    other = tmp_path / "other.onnx"
    save(Spec(seed=1), other)
    assert invoke("optimize", other, "--plan", plan, "-o", tmp_path / "out") == refusal(
        f"the plan was made for model {onnx_sha256(block)[:12]}, but {other} is model {onnx_sha256(other)[:12]}",
        "make a plan for this model with `moe-edge plan`; "
        "if it is the same model exported by another tool: optimize --any-model",
    )
    assert invoke("optimize", other, "--plan", plan, "--any-model", "-o", tmp_path / "out")[0] == 0


def test_a_plan_for_an_unknown_layer_is_refused(block, tmp_path):
    plan = plan_for(block, name="layers.7.mlp")
    assert invoke("optimize", block, "--plan", plan, "-o", tmp_path / "out") == refusal(
        "the plan names layer 'layers.7.mlp', which the model lacks", f"the model's MoE layers are: {NAME}"
    )


def test_a_plan_that_keeps_fewer_than_k_is_refused(block, tmp_path):
    plan = plan_for(block)
    edited = json.loads(plan.read_text())
    edited["layers"][0]["keep"] = [2]
    plan.write_text(json.dumps(edited))
    assert invoke("optimize", block, "--plan", plan, "-o", tmp_path / "out") == refusal(
        f"layer {NAME} keeps 1 of 8 experts, but its router selects K=2 a token",
        "keep at least 2: --keep 2; or let K shrink with the layer: --clamp-top-k",
    )


def test_an_output_that_exists_is_left_as_it_is(block, tmp_path):
    (tmp_path / "out").mkdir()
    assert invoke("optimize", block, "-o", tmp_path / "out") == refusal(
        f"{tmp_path / 'out'} already exists", f"give another -o, or remove it first: rm -r {tmp_path / 'out'}"
    )
    assert leftovers(tmp_path / "out") == set()


# --- partial models -------------------------------------------------------------------------------------------------


@pytest.fixture
def partial(zoo, tmp_path):
    """A model whose second router is bent by a Tanh that no reader knows."""
    directory = tmp_path / "partial"
    directory.mkdir()
    shutil.copy(zoo.exported("vmoe") / "model.onnx.data", directory)
    model = onnx.load(zoo.exported("vmoe") / "model.onnx", load_external_data=False)
    topk = [node for node in model.graph.node if node.op_type == "TopK"][1]
    (softmax,) = (node for node in model.graph.node if node.output[0] == topk.input[0])
    position = list(model.graph.node).index(softmax)
    model.graph.node.insert(position, onnx.helper.make_node("Tanh", softmax.input, ["bent"], name="bend"))
    softmax.input[0] = "bent"
    onnx.save(model, directory / "model.onnx")
    return directory


BENT = "experts: the logits are no Gemm or MatMul (at Tanh 'bend')"


def test_a_model_with_an_unknown_layer_is_refused(partial, tmp_path):
    code, stdout, stderr = invoke("optimize", partial, "-o", tmp_path / "out")
    assert (code, stdout) == (1, "")
    lines = stderr.splitlines()
    assert lines[0] == f"error: {partial / 'model.onnx'}: 1 MoE layer(s) not recognised"
    assert lines[1].startswith("layer layers.3.mlp (TopK '")
    assert lines[2] == f"  {BENT}"
    assert lines[-1] == f"hint: {NOT_RECOGNISED}"


def test_allow_partial_leaves_unknown_layers_alone(partial, tmp_path):
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    layer = LayerPlan("layers.1.mlp", 8, 2, (1, 2, 6))
    PruningPlan(onnx_sha256(partial / "model.onnx"), "by hand", (layer,)).save(plan)
    code, stdout, stderr = invoke("optimize", partial, "--plan", plan, "--allow-partial", "-o", out)
    assert (code, stderr) == (0, "")
    assert stdout.startswith(f"{out}: proven to ")
    assert "\n  left as it is: layer layers.3.mlp (TopK '" in stdout
    assert f"\n    {BENT}\n" in stdout
    weights = {tensor.name: tensor.dims[0] for tensor in onnx.load(out / "model.onnx").graph.initializer if tensor.dims}
    assert weights["layers.3.mlp.experts.up_proj"] == 8
    assert [(block.name, block.experts) for block in Manifest.load(out).blocks] == [("layers.1.mlp", 3)]


def test_a_plan_never_reaches_an_unknown_layer(partial, tmp_path):
    plan = tmp_path / "plan.json"
    layer = LayerPlan("layers.3.mlp", 8, 2, (1, 2, 6))
    PruningPlan(onnx_sha256(partial / "model.onnx"), "by hand", (layer,)).save(plan)
    assert invoke("optimize", partial, "--plan", plan, "--allow-partial", "-o", tmp_path / "out") == refusal(
        "the plan names layer 'layers.3.mlp', which the model lacks", "the model's MoE layers are: layers.1.mlp"
    )


# --- ends before its time -------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_leaves_nothing(block, tmp_path, monkeypatch):
    def interrupted(self, model, *_):
        assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxRuntimeRunner, "run", interrupted)
    assert invoke("optimize", block, "-o", tmp_path / "out") == (130, "", "interrupted; nothing half-written is left\n")
    assert leftovers(tmp_path) == {"block.onnx"}


def test_a_failed_proof_ends_with_3_and_leaves_nothing(block, tmp_path, monkeypatch):
    honest = OnnxRuntimeRunner.run

    def wrong(self, model, *rest):
        results = honest(self, model, *rest)
        return results if ".out." not in str(model) else [{"out": 2 * result["out"]} for result in results]

    monkeypatch.setattr(OnnxRuntimeRunner, "run", wrong)
    assert invoke("optimize", block, "-o", tmp_path / "out") == (
        3,
        "",
        "verification failed: output 'out' of the optimised graph differs from the original with the dropped experts "
        "unselectable by 1.00e+00 of its range (allowed 1e-05 for float32); nothing was written\n",
    )
    assert leftovers(tmp_path) == {"block.onnx"}
