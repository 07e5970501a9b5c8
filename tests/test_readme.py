"""README says what is true: its commands run and print what it shows."""

from pathlib import Path

from models.support import families
from tests.markdown import run_markdown

README = Path(__file__).parents[1] / "README.md"


def test_the_commands_of_the_readme_run(tmp_path, commands):
    run_markdown(README, tmp_path, commands)


def test_families_are_counted_as_in_their_table():
    stages = ("read", "calibrated", "exported", "pruned in ONNX")
    read, calibrated, exported, pruned = (sum(row.reason(stage) is None for row in families()) for stage in stages)
    text = README.read_text(encoding="utf-8")
    counts = f"{read} are read, {calibrated} calibrated, {exported} exported and {pruned} pruned in ONNX"
    assert f"Of {len(families())} families with experts {counts}" in text
    assert f" {read - 2} families from Mixtral to DeepSeek-V4, BERT with experts, V-MoE" in text
