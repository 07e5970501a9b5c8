"""What hangs below what."""

from moe_spec.statistics import Statistics
from report.artifacts import Found
from report.chain import chain
from tests.report.made_up import model, plan, run


def tree(nodes):
    return [(node.kind, node.path, tree(node.children)) for node in nodes]


def statistics(path, of):
    return Found(path, path, Statistics(of, ("data",), ()))


def test_what_is_known_of_a_pruned_graph_hangs_below_it():
    """Its statistics and plans call it by the identity of what is left, which no manifest's hash is."""
    optimized = model("optimized", "exported", keep=2, model_sha256="left")
    engine = model("engine", "optimized", keep=2, model_sha256="left", kind="engine")
    seen, again = statistics("again.safetensors", "left"), Found("p.json", "p", plan(1, "left"))
    found = run(model("exported", kind="exported"), optimized, engine, statistics=(seen,), plans=(again,))
    ((_, _, ((_, _, ((_, _, below),)),)),) = tree(chain(found))
    assert below == [("statistics", "again.safetensors", []), ("plan", "p.json", []), ("engine", "engine", [])]


def test_what_is_not_here_has_its_own_kind():
    found = [
        model("a", "checkpoint", kind="exported"),
        model("b", "file", source="file"),
        model("c", "manifest", keep=2, kind="engine"),
    ]
    kinds = [(node.kind, node.sha256) for node in chain(run(*found))]
    assert kinds == [("checkpoint", "checkpoint"), ("ONNX file", "file"), ("model", "manifest")]


def test_a_plan_for_the_checkpoint_that_it_lies_in_makes_no_child_of_it():
    whole = Found("folder", "checkpoint", "config.json")
    known = {"checkpoints": (whole,), "plans": (Found("folder/plan.json", "p", plan()),)}
    artifacts = run(**known)
    assert artifacts.pruned == {}
    assert tree(chain(artifacts)) == [("checkpoint", "folder", [("plan", "folder/plan.json", [])])]
