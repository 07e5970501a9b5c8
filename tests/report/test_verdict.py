"""What decides: identity by hash, and accuracies on the same data. Paths and counts of experts decide nothing."""

import pytest

from moe_spec.plan import PruningPlan
from report.artifacts import Finetuning, Found
from report.variants import variants_of
from report.verdict import whole_of
from tests.report.made_up import model, parity, plan, run, verdict_of

EXPORTED = model("exported", kind="exported")
PRUNED = model("pruned", "exported", keep=2, size=600)
BASELINE = parity("exported", "checkpoint", 0.928, path="unpruned.json")
UNKNOWN = "Everything verified computes what it should; what pruning costs is not known"


def checkpoint(path: str, sha256: str) -> Found[str]:
    return Found(path, sha256, "config.json")


def test_accuracies_on_other_data_are_not_compared():
    verdict = verdict_of(run(EXPORTED, PRUNED, BASELINE, parity("pruned", accuracy=0.99, data="train")))
    assert (verdict.state, verdict.headline, verdict.decisions["pruned"]) == ("proven", UNKNOWN, "proven")
    assert "pruned was measured on other data than the unpruned model: its loss is not known." in verdict.reasons


def test_of_several_accuracies_the_one_on_the_data_of_the_unpruned_model_counts():
    on_train = parity("pruned", accuracy=0.99, data="train", path="a.json")
    on_test = parity("pruned", accuracy=0.85, path="b.json")
    verdict = verdict_of(run(EXPORTED, PRUNED, BASELINE, on_train, on_test))
    assert verdict.decisions == {"exported": "unpruned", "pruned": "costs"}
    assert verdict.baseline is not None
    assert (verdict.baseline.value, verdict.baseline.data_sha256) == (0.928, "test")


def test_the_unpruned_model_is_measured_on_what_most_others_are():
    on_train = parity("exported", "checkpoint", 1.0, data="train", path="a.json")
    verdict = verdict_of(run(EXPORTED, PRUNED, on_train, BASELINE, parity("pruned", accuracy=0.92)))
    assert (verdict.state, verdict.chosen) == ("ship", "pruned")


def test_what_was_rounded_is_no_baseline_and_is_judged_itself():
    rounded = model("int4", "exported", size=300, precision={"experts": "int4", "rest": None, "block_size": None})
    reports = parity("int4", accuracy=0.80), parity("pruned", accuracy=0.925)
    verdict = verdict_of(run(rounded, EXPORTED, PRUNED, BASELINE, *reports))
    assert verdict.decisions == {"exported": "unpruned", "pruned": "ship", "int4": "costs"}
    assert verdict.baseline is not None
    assert verdict.baseline.value == 0.928
    assert verdict.reasons[-1] == "Smaller, 300 bytes, is int4, which loses 12.8 points."


def test_engines_of_what_was_rounded_are_rounded_too():
    rounded = model("int8", "exported", precision={"experts": "int8"})
    engine = model("engine", "int8", kind="engine")
    reports = parity("int8", accuracy=0.9), parity("engine", accuracy=0.9)
    verdict = verdict_of(run(EXPORTED, rounded, engine, BASELINE, *reports))
    assert verdict.decisions == {"exported": "unpruned", "int8": "costs", "engine": "costs"}
    assert verdict.headline == "Proven, but every rounded variant loses more than 1 point"


def test_size_and_accuracy_are_those_of_one_unpruned_model_that_passed():
    larger = model("larger", "exported", size=5000)
    smaller = model("smaller", "exported", size=900)
    rest = [parity("larger", accuracy=0.9, passed=False), parity("smaller", accuracy=0.92)]
    for order in (1, -1):
        artifacts = run(EXPORTED, *(larger, smaller)[::order], PRUNED, BASELINE, *rest, parity("pruned", accuracy=0.9))
        variants = {variant.label: variant for variant in variants_of(artifacts)}
        assert whole_of(variants["pruned"], list(variants.values())) == variants["exported"]


def test_what_came_of_a_pruned_checkpoint_is_pruned():
    """Though no plan stands in its manifest."""
    first = model("exported", "small", source="small", kind="exported", experts=2)
    known = {"checkpoints": (checkpoint("small", "small"),), "plans": (Found("small/plan.json", "", plan()),)}
    verdict = verdict_of(run(first, parity("exported", "small", 0.9), **known))
    assert (verdict.state, verdict.baseline, verdict.decisions) == ("proven", None, {"exported": "proven"})
    assert verdict.reasons[-1].startswith("The accuracy of the unpruned model is not in this directory: ")


@pytest.mark.parametrize("own", [None, plan(of="small")])
def test_what_was_trained_after_it_was_pruned_is_measured_by_what_was_there_before(own: PruningPlan | None):
    tuned = model("tuned", "trained", source="trained", kind="exported", experts=2, size=600)
    plans = [Found("small/plan.json", "", plan())]
    plans += [] if own is None else [Found("trained/plan.json", "", own)]
    known = {
        "checkpoints": (checkpoint("small", "small"), checkpoint("trained", "trained")),
        "plans": tuple(plans),
        "finetunings": (Found("trained/finetuning.json", "", Finetuning("plain", "small", "", None, {}, {})),),
    }
    verdict = verdict_of(run(EXPORTED, tuned, BASELINE, parity("tuned", "trained", 0.92), **known))
    assert verdict.decisions == {"exported": "unpruned", "tuned": "ship"}


def test_another_model_in_the_directory_makes_none_pruned():
    other = model("other", source="other", parent="other", kind="exported", experts=60, size=9000)
    reports = parity("other", "other", 0.99), parity("pruned", accuracy=0.925)
    verdict = verdict_of(run(EXPORTED, PRUNED, other, BASELINE, *reports))
    assert verdict.decisions == {"other": "unpruned", "exported": "unpruned", "pruned": "ship"}
    assert verdict.baseline is not None
    assert verdict.baseline.value == 0.928


@pytest.mark.parametrize("reference", ["pruned", "engine", "elsewhere", "other"])
def test_beside_what_it_was_not_made_from_a_pruned_model_is_not_verified(reference):
    other = model("other", source="other", parent="other")
    engine = model("engine", "pruned", kind="engine")
    found = parity("pruned", reference, 0.925, path="parity.json")
    verdict = verdict_of(run(EXPORTED, PRUNED, engine, other, BASELINE, found))
    assert (verdict.state, verdict.decisions["pruned"]) == ("proven", "unverified")
    assert f"parity.json proves nothing: pruned was not made from {reference}" in verdict.reasons


@pytest.mark.parametrize("reference", ["exported", "checkpoint", "masked", "sibling"])
def test_beside_what_it_was_made_from_or_another_of_that_it_is(reference):
    masked = model("masked", "checkpoint", kind="reference", keep=2)
    sibling = model("sibling", "exported", keep=2)
    found = parity("pruned", reference, 0.925)
    verdict = verdict_of(run(EXPORTED, PRUNED, masked, sibling, BASELINE, found))
    assert verdict.decisions["pruned"] == "ship"


def test_a_report_on_what_is_not_here_is_told_of():
    verdict = verdict_of(run(EXPORTED, parity("an older one", passed=False, path="parity.json")))
    assert (verdict.state, verdict.headline) == ("unverified", "Nothing that is here was verified")
    gone = "parity.json is of a model that is not here or was changed since"
    assert verdict.reasons[0] == f"{gone}, and failed: layer moe: it is wrong"


@pytest.mark.parametrize(("passed", "state"), [(True, "proven"), (False, "fails")])
def test_checkpoints_are_verified_too(passed, state):
    found = parity("identity", "exported", passed=passed)
    verdict = verdict_of(run(EXPORTED, found, checkpoints=(checkpoint("folder", "identity"),)))
    assert verdict.state == state
    assert verdict.reasons[0] == (
        "The one verified variant computes what its reference computes." if passed else "folder: layer moe: it is wrong"
    )


def test_some_losses_may_be_unknown():
    other = model("other", "exported", keep=1)
    found = [BASELINE, parity("pruned", accuracy=0.8), parity("other")]
    verdict = verdict_of(run(EXPORTED, PRUNED, other, *found))
    assert verdict.headline == "Proven, but every pruned variant that was measured loses more than 1 point"
