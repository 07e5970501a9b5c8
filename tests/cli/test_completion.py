"""The three shells complete verbs, options, and values that come out of the tables."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cli.completion import VALUES
from cli.main import build_app

INSTALLED = Path(sys.executable).parent / "moe-edge"
COMMAND: Any = typer.main.get_command(build_app())
SOME = {
    "against": "torch.compile", "also": "rtx-ada", "backend": "tensorrt-rtx", "criterion": "seer-soft",
    "device_map": "sequential", "dtype": "bf16", "family": "deepseek_v3", "form": "dense",
    "hardware_compatibility": "ampere+", "method": "seer", "optimize precision": "int8", "plan router": "replace",
    "plan target": "edge-llm-fp16", "precision": "fp16", "provider": "openvino", "recipe": "adamw",
    "rest_precision": "int8", "scope": "global", "score": "hit-rate", "target": "jetson-orin", "variant": "staged",
}  # fmt: skip


def shell(name, line, action="complete", **more):
    """What the shell's completion of ``line`` prints."""
    asked = {"_MOE_EDGE_COMPLETE": f"{action}_{name}", "_TYPER_COMPLETE_ARGS": line, "COMP_WORDS": line}
    asked |= {"COMP_CWORD": str(len(line.split()) - 1), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    found = subprocess.run([INSTALLED], env=os.environ | asked | more, capture_output=True, text=True, check=True)
    return found.stdout


@pytest.mark.parametrize(
    ("name", "sign"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command")]
)
def test_each_shell_has_a_script(name, sign):
    script = shell(name, "", "source")
    assert sign in script
    assert f"_MOE_EDGE_COMPLETE=complete_{name}" in script


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_each_shell_completes_values(name):
    assert "seer-soft" in shell(name, "moe-edge plan --criterion seer-s")


SHELLS = {
    "bash": "{script}\nCOMP_WORDS=(moe-edge {words}); COMP_CWORD={last}\n"
    "_moe_edge_completion moe-edge; echo ${{COMPREPLY[@]}}",
    "fish": "{script}\ncomplete -C 'moe-edge {words}'",
}
"""What lets a shell itself complete ``words``."""


@pytest.mark.parametrize(("words", "found"), [("finet", "finetune"), ("build --target jetson-o", "jetson-orin")])
@pytest.mark.parametrize("name", SHELLS)
def test_the_shell_itself_completes(name, words, found):
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    code = SHELLS[name].format(script=shell(name, "", "source"), words=words, last=len(words.split()))
    path = os.pathsep.join((str(INSTALLED.parent), os.environ["PATH"]))
    done = subprocess.run(
        [name, "-c", code], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[:1] == [found]


def test_every_table_is_completed_and_narrowed():
    seen = set()
    for command in COMMAND.commands.values():
        for parameter in command.params:
            key = f"{command.name} {parameter.name}"
            key = key if key in VALUES else parameter.name
            if key in VALUES:
                seen.add(key)
                assert SOME[key] in [item.value for item in parameter.shell_complete(None, "")], key
                assert parameter.shell_complete(None, SOME[key])[0].value == SOME[key]
                assert parameter.shell_complete(None, "no such thing") == []
    assert seen == set(SOME) == set(VALUES)
