"""Every fault that is planted is caught, and found by cutting the graph; what changes nothing passes."""

import json
import re

import onnx
import pytest

from benchmarks.planted import FAULTS, plant
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from runtime.verification.fault import EXPERTS, REST, ROUTER, Fault
from runtime.verification.report import ParityReport
from runtime.verification.tolerances import TOLERANCES
from tests.cli.helpers import done, invoke
from tests.zoo import RUNNER

FOUND = {
    "two experts swapped": (
        EXPERTS,
        [1, 2],
        "expert 1 gives what expert 2 should; expert 2 gives what expert 1 should",
    ),
    "router rows off by one": (ROUTER, [], r"it scores expert 0 as expert 7, .* should be|it selects other experts .*"),
    "one router row of another expert": (ROUTER, [], "it scores expert 3 as expert 2 should be"),
    "a scale applied twice": (ROUTER, [], r"it selects the same experts, with gates [\d.]+ times as large"),
    "a renormalisation missing": (ROUTER, [], r"it selects the same experts, with gates that add up to .*"),
    "an expert zeroed": (EXPERTS, [5], "it gives nothing"),
}
"""Where each is found, and what is said of it."""


def verify(candidate, reference, *options):
    code, out, err = invoke("verify", candidate, "--reference", reference, "--json", *options)
    return code, json.loads(out), err


@pytest.mark.parametrize(
    ("fault", "name", "layer"),
    [
        *((fault, "mixtral", index % 2) for index, fault in enumerate(FAULTS)),
        ("a scale applied twice", "deepseek_v3", 1),
        ("a renormalisation missing", "deepseek_v3", 0),
    ],
)
def test_a_planted_fault_is_caught_and_found(zoo, tmp_path, fault, name, layer):
    exported = zoo.exported(name)
    code, report, err = verify(plant(exported, tmp_path / "broken", FAULTS[fault], layer), exported)
    part, experts, says = FOUND[fault]
    names = [entry["name"] for entry in report["layers"]]
    found = report["fault"]
    assert (code, found["part"], found["layer"], found["experts"]) == (3, part, names[layer], experts)
    assert re.fullmatch(says, found["says"])
    assert report["first_wrong_layer"] == names[layer]
    assert err.endswith(
        f"; the fault is in {Fault(part, names[layer], tuple(experts), None, '').place}: {found['says']}\n"
    )


@pytest.mark.parametrize("form", ["sorted", "dense", "gather", "moe"])
def test_another_form_is_no_fault(zoo, tmp_path, form):
    exported = zoo.exported("mixtral")
    code, report, err = verify(plant(exported, tmp_path / form, lambda block: block, 0, form), exported)
    assert (code, report["fault"], err) == (0, None, "")


@pytest.mark.parametrize("form", ["dense", "gather"])
def test_a_fault_is_found_in_any_form(zoo, tmp_path, form):
    broken = plant(zoo.exported("mixtral"), tmp_path / "broken", FAULTS["two experts swapped"], 0, form)
    assert verify(broken, zoo.exported("mixtral"))[1]["fault"]["experts"] == [1, 2]


@pytest.mark.parametrize(("fault", "experts"), [("two experts swapped", [1, 2]), ("an expert zeroed", [5])])
def test_experts_of_an_op_that_routes_by_itself_are_told_by_their_tokens(zoo, tmp_path, fault, experts):
    exported = zoo.exported("mixtral")
    _, report, _ = verify(plant(exported, tmp_path / "broken", FAULTS[fault], 1, "moe"), exported)
    assert report["fault"]["part"] == EXPERTS
    assert set(report["fault"]["experts"]) >= set(experts)


@pytest.mark.parametrize(
    ("weight", "layer", "place"),
    [
        ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp", "what lies before layer model.layers.1.mlp"),
        ("model.norm.weight", None, "what lies behind the last MoE layer"),
    ],
)
def test_a_fault_outside_the_moe_layers_is_found_between_them(zoo, tmp_path, weight, layer, place):
    path = plant(zoo.exported("mixtral"), tmp_path / "broken", lambda block: block, 0)
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if weight in tensor.name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.5, tensor.name))
    onnx.save(model, path)
    code, report, err = verify(path, zoo.exported("mixtral"))
    found = report["fault"]
    assert (code, found["part"], found["layer"], found["experts"]) == (3, REST, layer, [])
    assert f"; the fault is in {place}: it differs by " in err


def test_an_engine_of_int8_experts_is_judged_as_its_model_is(zoo, tmp_path):
    optimize(zoo.exported("vmoe"), tmp_path / "int8", RUNNER, form="sorted", precision=Precision("int8"), prove=False)
    done("build", tmp_path / "int8", "--target", "cpu", "-o", tmp_path / "engine")
    code, report, _ = verify(tmp_path / "engine", zoo.exported("vmoe"))
    assert (code, report["precision"]) == (0, "int8")


def test_int8_experts_pass_by_their_own_tolerance_and_fail_by_that_of_float32(zoo, tmp_path):
    exported = zoo.exported("mixtral")
    optimize(exported, tmp_path / "int8", RUNNER, form="sorted", precision=Precision("int8"))
    code, report, _ = verify(tmp_path / "int8", exported)
    assert (code, report["precision"]) == (0, "int8")
    assert 1e-3 < report["outputs"][0]["forced_max_rel"] < TOLERANCES["int8"].element
    code, report, _ = verify(tmp_path / "int8", exported, "--precision", "float32")
    assert (code, report["fault"]["part"], report["fault"]["layer"]) == (3, EXPERTS, "model.layers.0.mlp")
    assert re.fullmatch(r"they differ by [\d.]+ to [\d.]+ of their largest magnitude", report["fault"]["says"])


@pytest.mark.parametrize("fault", ["two experts swapped", "a scale applied twice", "an expert zeroed"])
def test_a_fault_beside_int8_experts_is_caught_too(zoo, tmp_path, fault):
    exported = zoo.exported("mixtral")
    broken = plant(exported, tmp_path / "broken", FAULTS[fault], 1)
    optimize(broken, tmp_path / "int8", RUNNER, form="sorted", precision=Precision("int8"))
    code, report, _ = verify(tmp_path / "int8", exported)
    assert (code, report["precision"], report["fault"]["part"]) == (3, "int8", FOUND[fault][0])
    assert report["fault"]["experts"] == FOUND[fault][1]


def test_whose_scores_an_expert_has_is_seen_through_the_rounding_of_4_bits(zoo, tmp_path):
    exported = zoo.exported("mixtral")
    broken = plant(exported, tmp_path / "broken", FAULTS["one router row of another expert"], 1)
    optimize(broken, tmp_path / "int4", RUNNER, form="sorted", precision=Precision("int4"))
    code, report, _ = verify(tmp_path / "int4", exported, "--no-bisect")
    assert (code, report["precision"]) == (3, "int4")
    assert [layer["scored_as"] for layer in report["layers"]] == [[], [0, 1, 2, 2, 4, 5, 6, 7]]


def test_tolerances_come_from_a_file_that_changes_some(zoo, tmp_path):
    exported, path = zoo.exported("mixtral"), tmp_path / "tolerances.json"
    optimize(exported, tmp_path / "int8", RUNNER, form="sorted", precision=Precision("int8"))
    path.write_text('{"int8": {"element": 1e-3}}')
    code, report, err = verify(tmp_path / "int8", exported, "--tolerances", path, "--no-bisect")
    assert (code, report["tolerance"]["element"], report["tolerance"]["margin"]) == (3, 1e-3, TOLERANCES["int8"].margin)
    assert "where the reference's routers choose the experts, allowed 1.0e-03" in err


def test_what_an_op_routes_by_itself_is_not_forced_and_what_flips_everywhere_is(zoo, tmp_path):
    exported = zoo.exported("mixtral")
    fused = plant(exported, tmp_path / "moe", lambda block: block, 0, "moe")
    assert verify(fused, exported)[1]["forced"] is False
    rolled = plant(exported, tmp_path / "rolled", FAULTS["router rows off by one"], 1)
    _, report, _ = verify(rolled, exported, "--no-bisect")
    assert report["forced"] is True
    assert report["outputs"][0]["forced_max_rel"] < 1e-5


def test_the_search_may_be_left_out_and_a_report_with_a_fault_is_read_back(zoo, tmp_path):
    exported, path = zoo.exported("mixtral"), tmp_path / "parity.json"
    broken = plant(exported, tmp_path / "broken", FAULTS["an expert zeroed"], 1)
    code, report, _ = verify(broken, exported, "--no-bisect")
    assert (code, report["fault"], report["notes"]) == (3, None, [])
    _, report, _ = verify(broken, exported, "-o", path)
    assert ParityReport.load(path).fault == Fault(
        EXPERTS, report["first_wrong_layer"], (5,), report["fault"]["error"], "it gives nothing"
    )
