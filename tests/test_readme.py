"""README says what is true: its commands run and print what it shows."""

from pathlib import Path

from tests.markdown import run_markdown

README = Path(__file__).parents[1] / "README.md"


def test_the_commands_of_the_readme_run(tmp_path, commands):
    run_markdown(README, tmp_path, commands)
