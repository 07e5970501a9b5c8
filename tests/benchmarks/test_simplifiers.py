"""The table of simplifiers has a column for each, whether or not it is installed, and believes none of them."""

import sys
from pathlib import Path

import numpy as np
import onnx

from benchmarks import simplifiers
from benchmarks.masked import MASKED, routers
from benchmarks.simplifier_tools import TOOLS, Tool
from benchmarks.simplifiers import QUICK, Outcome, Row, measure, parameters, report, summarize
from moe_spec.errors import UserError
from moe_spec.manifest import MODEL


def copy(source: Path, out: Path) -> None:
    out.mkdir()
    (out / MODEL).write_bytes(source.read_bytes())


def spoil(source: Path, out: Path) -> None:
    model = onnx.load(source)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "down_stack")
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    out.mkdir()
    onnx.save(model, out / MODEL)


def lose(source: Path, out: Path) -> None:
    model = onnx.load(source)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "down_stack"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    out.mkdir()
    onnx.save(model, out / MODEL)


def refuse(source: Path, out: Path) -> None:
    raise UserError(f"{source}: not this one", hint="take another")


def crash(source: Path, out: Path) -> None:
    raise ZeroDivisionError("oh\n  no")


def applied(run, graph="stacked.add", **options) -> tuple[Row, str]:
    tools = [Tool("it", "onnx", "it()", run, **options)]
    rows = measure([graph], tools)
    return rows[0], report(rows, "python", tools)


def test_the_quick_document_has_a_column_for_every_tool_and_a_line_for_every_graph(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simplifiers", "--quick"])
    simplifiers.main()
    captured = capsys.readouterr()
    tables = [line for line in captured.out.splitlines() if line.startswith("| ")]
    assert tables[0] == f"| graph | ideal | {' | '.join(tool.name for tool in TOOLS)} |"
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in tables}
    missing = sum(tool.version is None for tool in TOOLS)
    for name in QUICK:
        assert (lines[name].count("|"), lines[name].count("not installed")) == (len(TOOLS) + 3, missing)
    for tool in TOOLS:
        assert f" | {tool.call} | " in lines[tool.name]
        assert ("not installed" in lines[tool.name]) == (tool.version is None)
    assert "Where every expert can be chosen (stacked.unmasked), nobody removed a parameter." in captured.out
    assert captured.err.split() == list(QUICK)


def test_a_tool_that_is_not_installed_is_named_and_how_to_install_it():
    tool = Tool("absent", "no_such_module", "it()", crash)
    rows = measure(["stacked.add"], [tool])
    lines = report(rows, "python", [tool]).splitlines()
    assert "| stacked.add | 147,840 | not installed |" in lines
    assert '| absent | not installed: `pip install "moe-edge[bench]"` | it() | - | - | - |' in lines
    assert 'Not installed, so not run: absent. `pip install "moe-edge[bench]"` brings them.' in lines


def test_a_file_that_computes_something_else_is_wrong_and_gains_nothing():
    row, text = applied(spoil)
    assert row.outcomes["it"].gain == 0
    assert "| stacked.add | 147,840 | 0 **wrong** |" in text
    assert "Of 1 files that were written, 1 cannot be used: it, stacked.add (**wrong**)." in text


def test_a_file_that_onnx_runtime_does_not_load_gains_nothing():
    row, text = applied(lose)
    assert row.outcomes["it"].removed == 8 * 128 * 64
    assert row.outcomes["it"].gain == 0
    assert "| stacked.add | 147,840 | 65,536 **does not load** |" in text
    assert "\n- it: **does not load**: model.onnx cannot be loaded: " in text


def test_what_a_tool_says_is_quoted_without_where_its_input_lay():
    assert "\n- it: refused: not this one (stacked.add)" in applied(refuse)[1]
    assert "\n- it: failed: ZeroDivisionError: oh no (stacked.add)" in applied(crash)[1]


def test_a_plan_is_not_given_where_it_would_mean_something_else():
    row, text = applied(copy, "stacked.zero_gates", told=True)
    assert row.outcomes["it"] == Outcome(None, problem=simplifiers.NO_PLAN)
    assert row.graph.mask in routers.BEHIND
    assert "| stacked.zero_gates | 147,456 | - |" in text


def test_weights_count_whether_or_not_they_are_read_and_wherever_they_stand(tmp_path):
    model = MASKED["if.constant_if"]()
    before = 8 * 24_576 + 8 * 64
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True)
    assert parameters(tmp_path / "model.onnx") == before
    unread = onnx.numpy_helper.from_array(np.ones((10, 10), np.float32), "unread")
    branch = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    branch.initializer.append(unread)
    branch.node.append(onnx.helper.make_node("Constant", [], ["here"], value=unread))
    onnx.save(model, tmp_path / "more.onnx")
    assert parameters(tmp_path / "more.onnx") == before + 200


def test_the_summary_says_what_the_numbers_say():
    theirs, ours = Tool("theirs", "onnx", "", copy), Tool("ours", "graph_passes", "", copy)
    names = ("stacked.add", "dense.add", "grouped.add", "if.constant_if", "stacked.unmasked")
    ideals = (100, 100, 100, 90, 0)
    found = (Outcome(100), Outcome(40), Outcome(None, problem="refused"), Outcome(90, 1.0, "**wrong**"), Outcome(0))
    rows = [
        Row(MASKED[name], ideal, {"theirs": Outcome(90 if ideal == 90 else 0), "ours": outcome})
        for name, ideal, outcome in zip(names, ideals, found, strict=True)
    ]
    assert summarize(rows, [theirs, ours]).splitlines() == [
        "In 3 of 4 graphs with experts out of reach, none of the 1 simplifiers that ran removed a parameter "
        "(they did in if.constant_if).",
        "Of 4 that were given to ours, it removed all that could go from 1 and a part from 1, refused 1, and removed "
        "nothing from 1.",
        "Where every expert can be chosen (stacked.unmasked), nobody removed a parameter.",
        "Of 9 files that were written, 1 cannot be used: ours, if.constant_if (**wrong**).",
    ]


def test_a_control_that_loses_something_is_named():
    rows = [Row(MASKED["stacked.unmasked"], 0, {"theirs": Outcome(5)})]
    said = (
        "Where every expert can be chosen (stacked.unmasked), parameters went all the same: theirs in stacked.unmasked."
    )
    assert said in summarize(rows, [Tool("theirs", "onnx", "", copy)])
