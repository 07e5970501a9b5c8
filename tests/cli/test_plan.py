import json

import numpy as np
import pytest
import safetensors.numpy

import moe_spec.record
from models.checkpoints import save_model
from models.moe_layers import find_moe_layers
from moe_spec.identity import onnx_sha256
from moe_spec.plan import PruningPlan
from moe_spec.statistics import KEYS, LayerStatistics, Statistics
from pruning.criteria import NOTES
from tests.cli.helpers import invoke, leftovers
from tests.graph_passes.block_models import Spec, save
from tests.models_table import TINY, example_inputs


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "statistics.safetensors"
    layers = tuple(
        LayerStatistics(
            f"layers.{index}.mlp", 8, 2, 40, {key: np.arange(8.0) for key, row in KEYS.items() if row.axes == "E"}
        )
        for index in (1, 3)
    )
    Statistics("model", ("data",), layers).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "vmoe"
    save_model(TINY["vmoe"](), directory)
    return directory


def test_plan_writes_a_plan_and_one_line(source, tmp_path):
    out = tmp_path / "plan.json"
    arguments = ("plan", source, "--criterion", "frequency", "--keep", "50%", "-o", out)
    assert invoke(*arguments) == (0, f"{out}: keeps 8 of 16 experts in 2 layers, by frequency\n", "")
    made = PruningPlan.load(out)
    assert [layer.keep for layer in made.layers] == [(4, 5, 6, 7)] * 2
    assert made.options == {
        "keep": 0.5,
        "scope": "layer",
        "seed": 0,
        "clamp_top_k": False,
        "router": "rows",
        "protect": False,
        "pretrained": None,
        "floor": 1,
        "target": None,
    }


def test_where_a_criterion_is_not_what_its_paper_does_plan_says_so(source, tmp_path):
    out = tmp_path / "plan.json"
    assert invoke("plan", source, "--criterion", "easy-ep", "--keep", 4, "-o", out) == (
        0, f"{out}: keeps 8 of 16 experts in 2 layers, by easy-ep\n  note: {NOTES['easy-ep']}\n", ""
    )  # fmt: skip


def test_a_search_that_did_not_try_all_subsets_says_so(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("pruning.reconstruction.MAX_SUBSETS", 7)
    images = example_inputs(TINY["vmoe"](), batch=2, sequence=0, seed=0)["pixel_values"]
    np.savez(tmp_path / "data.npz", pixel_values=images.numpy())
    out, arguments = tmp_path / "plan.json", ("--data", tmp_path / "data.npz", "--criterion", "naee", "--keep", 6)
    note = (
        "2 of 2 layers have too many subsets to try them all: their experts went one by one, each time the one that "
        "is missed least"
    )
    code, stdout, _ = invoke("plan", checkpoint, *arguments, "-o", out)
    assert (code, stdout) == (0, f"{out}: keeps 12 of 16 experts in 2 layers, by naee\n  note: {note}\n")
    assert PruningPlan.load(out).options["exact"] == [False, False]


def test_json_holds_the_whole_plan(source, tmp_path):
    out = tmp_path / "plan.json"
    code, stdout, stderr = invoke(
        "plan", source, "--keep", 1, "--clamp-top-k", "--scope", "global", "-o", out, "--json"
    )
    assert (code, stderr) == (0, "")
    assert json.loads(stdout) == {"output": str(out), **json.loads(json.dumps(PruningPlan.load(out).to_json()))}


def test_random_plans_for_a_bare_checkpoint(checkpoint, tmp_path):
    out = tmp_path / "plan.json"
    code, _, stderr = invoke("plan", checkpoint, "--criterion", "random", "--seed", 3, "--keep", 3, "-o", out)
    assert (code, stderr) == (0, "")
    assert [layer.name for layer in PruningPlan.load(out).layers] == ["layers.1.mlp", "layers.3.mlp"]


def test_two_checkpoints_are_compared(checkpoint, tmp_path):
    model, finetuned, out = TINY["vmoe"](), tmp_path / "finetuned", tmp_path / "plan.json"
    for layer in find_moe_layers(model):
        layer.router.get_parameter("weight").data[6] *= 3
    save_model(model, finetuned)
    arguments = ("--criterion", "router-norm", "--pretrained", checkpoint, "--keep", 1, "--router", "full", "-o", out)
    assert invoke("plan", finetuned, *arguments) == (
        0, f"{out}: keeps 2 of 16 experts in 2 layers, by router-norm\n", ""
    )  # fmt: skip
    layers = PruningPlan.load(out).layers
    assert [(layer.keep, layer.router, layer.top_k) for layer in layers] == [((6,), "full", 2)] * 2


def test_super_experts_stay(source, tmp_path):
    out = tmp_path / "plan.json"
    arguments = ("--criterion", "s(0,1,1)", "--keep", 2, "--protect", "-o", out)
    assert invoke("plan", source, *arguments)[0] == 0
    made = PruningPlan.load(out)
    assert (made.criterion, made.options["protect"]) == ("s(0,1,1)", True)


@pytest.fixture
def block(tmp_path):
    save(Spec(), tmp_path / "block.onnx")
    return tmp_path / "block.onnx"


def test_an_onnx_file_is_planned_by_naming_the_experts_that_stay(block, tmp_path):
    out = tmp_path / "plan.json"
    assert invoke("plan", block, "--experts", "6,1,2", "-o", out) == (
        0, f"{out}: keeps 3 of 8 experts in 1 layers, by hand\n", ""
    )  # fmt: skip
    made = PruningPlan.load(out)
    assert (made.model_sha256, made.layers[0].keep) == (onnx_sha256(block), (1, 2, 6))


def test_an_onnx_file_is_planned_at_random(block, tmp_path):
    out = tmp_path / "plan.json"
    assert invoke("plan", block, "--criterion", "random", "--keep", 3, "-o", out)[0] == 0
    assert len(PruningPlan.load(out).layers[0].keep) == 3


@pytest.mark.parametrize(
    "arguments", [(), ("--keep", 2, "--experts", "1,2"), ("--max-latency", "3ms", "--max-size", "1MB")]
)
def test_a_plan_has_a_budget_or_names(block, arguments, tmp_path):
    assert invoke("plan", block, *arguments, "-o", tmp_path / "plan.json") == (
        1, "", "error: a plan needs --keep, --max-size, --max-latency or --experts, one of them\n"
        "hint: --keep 4, --max-size 60%, --max-latency 3ms, or --experts 0,2,5\n"
    )  # fmt: skip


BUDGET_HINT = "give a whole number from 1, like --keep 4, or a share above 0 and at most 1, like --keep 0.5 or 50%"


@pytest.mark.parametrize(
    ("keep", "what", "hint"),
    [
        ("0", "--keep 0 is neither a count of experts nor a share of them", BUDGET_HINT),
        ("1.5", "--keep 1.5 is neither a count of experts nor a share of them", BUDGET_HINT),
        ("few", "--keep few is neither a count of experts nor a share of them", BUDGET_HINT),
        ("9", "--keep 9 asks for 9 experts, but layer layers.1.mlp has 8", "keep at most 8: --keep 8"),
        (
            "1",
            "layer layers.1.mlp keeps 1 of 8 experts, but its router selects K=2 a token",
            "keep at least 2: --keep 2; or let K shrink with the layer: --clamp-top-k",
        ),
    ],
)
def test_a_budget_that_cannot_be_is_refused(keep, what, hint, source, tmp_path):
    assert invoke("plan", source, "--keep", keep, "-o", tmp_path / "plan.json") == (
        1,
        "",
        f"error: {what}\nhint: {hint}\n",
    )
    assert leftovers(tmp_path) == {"statistics.safetensors"}


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def newer(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["moe_edge"]) | {"schema": 3}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, {"moe_edge": json.dumps(header)})


def foreign(path):
    safetensors.numpy.save_file({"weight": np.zeros(3)}, path)


REMAKE = "make it again with `moe-edge calibrate`"


@pytest.mark.parametrize(
    ("spoil", "what", "hint"),
    [
        (cut, "is no complete safetensors file: ", REMAKE),
        (newer, "has statistics schema 3, this moe-edge reads 2", f"update moe-edge, or {REMAKE}"),
        (foreign, "holds no statistics", REMAKE),
    ],
)
def test_statistics_that_are_none_are_refused(spoil, what, hint, source, tmp_path):
    spoil(source)
    code, _, stderr = invoke("plan", source, "--keep", 4, "-o", tmp_path / "plan.json")
    assert code == 1
    assert stderr.startswith(f"error: {source} {what}")
    assert stderr.endswith(f"\nhint: {hint}\n")


def test_a_missing_source_is_refused(tmp_path):
    nothing = tmp_path / "nothing"
    for criterion, expected in (("reap", "statistics (safetensors)"), ("random", "a checkpoint directory")):
        arguments = ("plan", nothing, "--criterion", criterion, "--keep", 4, "-o", tmp_path / "plan.json")
        error = f"error: {nothing} does not exist, expected {expected}\nhint: check the path\n"
        assert invoke(*arguments) == (1, "", error)


def test_an_existing_output_is_refused(source):
    error = f"error: {source} already exists\nhint: give another -o, or remove it first: rm -r {source}\n"
    assert invoke("plan", source, "--keep", 4, "-o", source) == (1, "", error)


def test_ctrl_c_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(payload):
        raise KeyboardInterrupt

    monkeypatch.setattr(moe_spec.record, "dump", interrupted)
    arguments = ("plan", source, "--keep", 4, "-o", tmp_path / "plan.json")
    assert invoke(*arguments) == (130, "", "interrupted; nothing half-written is left\n")
    assert leftovers(tmp_path) == {"statistics.safetensors"}


def test_a_checkpoint_is_planned_for_on_data_in_rounds(tmp_path):
    save_model(TINY["mixtral"](), tmp_path / "checkpoint")
    np.savez_compressed(tmp_path / "data.npz", input_ids=np.arange(40).reshape(4, 10))
    arguments = ("plan", tmp_path / "checkpoint", "--data", tmp_path / "data.npz", "--keep", 3)
    code, stdout, _ = invoke(*arguments, "--rounds", 2, "-o", tmp_path / "rounds.json", "--json")
    assert code == 0
    made = PruningPlan.load(tmp_path / "rounds.json")
    assert json.loads(stdout)["layers"] == [json.loads(json.dumps(layer.to_json())) for layer in made.layers]
    assert [len(layer.keep) for layer in made.layers] == [3, 3]
    assert (made.options["rounds"], made.statistics_sha256) == (2, None)
    code, _, stderr = invoke(*arguments, "--criterion", "random", "-o", tmp_path / "random.json")
    assert (code, stderr.partition("\n")[0]) == (1, "error: criterion 'random' does not look at data")


@pytest.mark.parametrize(("keep", "code"), [("40%", 0), ("64", 1)])
def test_a_target_rounds_a_share_and_refuses_a_count(keep, code, tmp_path):
    sums = {key: np.arange(256.0) for key, row in KEYS.items() if row.axes == "E"}
    Statistics("model", ("data",), (LayerStatistics("mlp", 256, 2, 40, sums),)).save(tmp_path / "s.safetensors")
    arguments = ("--keep", keep, "--floor", 4, "--target", "edge-llm-fp16", "-o", tmp_path / "plan.json")
    refused = (
        "error: layer mlp keeps 64 experts, target edge-llm-fp16 takes 128 or 256\n"
        "hint: the nearest that works: --keep 128 or --keep 256\n"
    )
    expected = (0, f"{tmp_path / 'plan.json'}: keeps 128 of 256 experts in 1 layers, by reap\n", "")
    assert invoke("plan", tmp_path / "s.safetensors", *arguments) == ((1, "", refused) if code else expected)


@pytest.mark.parametrize(
    ("ranking", "named"),
    [
        (("--criterion", "aimer"), "--criterion"),
        (("--data", "data.npz", "--floor", 2, "--scope", "global"), "--data and --floor and --scope"),
    ],
)
def test_named_experts_leave_nothing_to_rank(ranking, named, block, tmp_path):
    arguments = ("plan", block, "--experts", "6,1,2", *ranking, "-o", tmp_path / "plan.json")
    assert invoke(*arguments) == (
        1, "", f"error: --experts names the experts that stay, and leaves nothing to {named.split()[0]}\n"
        f"hint: leave out {named}, or --experts\n"
    )  # fmt: skip


def test_what_is_about_data_needs_data(source, tmp_path):
    arguments = ("plan", source, "--keep", 2, "--rounds", 2, "-o", tmp_path / "plan.json")
    assert invoke(*arguments) == (
        1, "", "error: --rounds is about looking at data, but there is none\nhint: name it: --data DATA.npz\n"
    )  # fmt: skip


def test_named_experts_are_bound_by_the_target_too(block, tmp_path):
    arguments = ("--experts", "6,1,2", "--target", "edge-llm-nvfp4", "-o", tmp_path / "plan.json")
    error = "error: layer layers.0.mlp keeps 3 experts, target edge-llm-nvfp4 takes 128 or 256\nhint: "
    assert invoke("plan", block, *arguments) == (1, "", error + "choose another --target\n")


def test_a_size_is_spent_by_search(tmp_path):
    save_model(TINY["mixtral"](), tmp_path / "checkpoint")
    np.savez_compressed(tmp_path / "data.npz", input_ids=np.arange(40).reshape(4, 10))
    out, arguments = tmp_path / "plan.json", ("plan", tmp_path / "checkpoint", "--data", tmp_path / "data.npz")
    code, stdout, stderr = invoke(*arguments, "--max-size", "60%", "--scope", "searched", "--trials", 4, "-o", out)
    assert (code, stderr) == (0, "")
    made = PruningPlan.load(out)
    kept, spent = sum(len(layer.keep) for layer in made.layers), made.options["budget"]["spent"]
    whole, accepted = made.options["budget"]["whole"], made.options["search"]["acceptance"]
    assert spent <= 0.6 * whole
    assert stdout == (
        f"{out}: keeps {kept} of 16 experts in 2 layers, by reap\n"
        f"  bytes: {spent:,} spent, {0.6 * whole:,.10g} most, {whole:,} whole\n"
        f"  acceptance: layer {accepted['layer']:.4f}, global {accepted['global']:.4f}, "
        f"searched {accepted['searched']:.4f}, the best of 4 plans\n"
    )


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (
            ("--max-size", "60%"),
            "--max-size 60% is spent on data",
            "moe-edge plan CHECKPOINT --data DATA.npz --max-size 60%",
        ),
        (
            ("--keep", 4, "--scope", "searched"),
            "--scope searched tries plans on data, and there is none",
            "moe-edge plan CHECKPOINT --data DATA.npz --scope searched",
        ),
    ],
)
def test_what_is_looked_for_on_data_needs_some(arguments, what, hint, source, tmp_path):
    assert invoke("plan", source, *arguments, "-o", tmp_path / "plan.json") == (
        1, "", f"error: {what}\nhint: {hint}\n"
    )  # fmt: skip


def test_milliseconds_are_measured_on_this_machine(checkpoint, tmp_path):
    pixels = example_inputs(TINY["vmoe"](), batch=4, sequence=1, seed=0)["pixel_values"].numpy()
    np.savez_compressed(tmp_path / "data.npz", pixel_values=pixels)
    out = tmp_path / "plan.json"
    arguments = ("plan", checkpoint, "--data", tmp_path / "data.npz", "--max-latency", "100%", "--scope", "searched")
    code, stdout, stderr = invoke(*arguments, "--trials", 2, "-o", out, "--target", "cpu")
    assert (code, stderr) == (0, "")
    made = PruningPlan.load(out)
    budget = made.options["budget"]
    assert [len(layer.keep) for layer in made.layers] == [8, 8]
    assert 0 < budget["spent"] <= budget["most"] == budget["whole"]
    assert (budget["unit"], made.options["target"], made.options["search"]["trials"]) == ("ms", "cpu", 1)
    assert stdout.splitlines()[1].startswith("  ms: ")


def test_milliseconds_of_another_machine_cannot_be_measured(checkpoint, tmp_path):
    arguments = ("--data", tmp_path / "nothing.npz", "--max-latency", "3ms", "--target", "rtx-ada")
    error = (
        "error: --max-latency is measured here, with ONNX Runtime on the CPU, which says nothing of target rtx-ada\n"
        "hint: leave out --target, or plan with --max-size\n"
    )
    assert invoke("plan", checkpoint, *arguments, "-o", tmp_path / "plan.json") == (1, "", error)
