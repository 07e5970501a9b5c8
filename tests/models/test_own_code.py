"""Code of a checkpoint's own runs where the user trusts it, from the checkpoint's own directory, and nowhere else."""

import re
import shutil

import pytest
import torch

from models.checkpoints import load_empty, load_model, load_skeleton, own_code, save_model
from models.moe_layers import find_moe_layers
from models.own_code import copy_code
from models.stored_parameters import StoredParameters
from moe_spec.errors import UserError
from moe_spec.files import sha256_text
from tests.models_table import TINY, example_inputs
from tests.own_code import AUTO_MAP, FILES, MODELING, edit_config

HERE = "read the code that it means, put all of it into the checkpoint's directory, and name it there: module.Class"
TRUST = "read these files; where you trust them, --trust-remote-code runs them (in Python trust_remote_code=True)"


@pytest.fixture
def checkpoint(own_checkpoint, tmp_path):
    """A checkpoint to be spoilt."""
    return shutil.copytree(own_checkpoint, tmp_path / "own")


def refused(what, hint):
    message = re.escape(f"{what}\nhint: {hint}")
    return pytest.raises(UserError, match=f"^{message}$")


def load_trusted(checkpoint):
    return load_model(checkpoint, trust_remote_code=True)


@pytest.mark.parametrize("load", [load_model, load_skeleton])
def test_it_does_not_run_unasked_and_the_files_are_named(load, checkpoint):
    ran = checkpoint / "ran"
    (checkpoint / "modeling_own.py").write_text(f"__import__('pathlib').Path({str(ran)!r}).touch()\n{MODELING}")
    what = f"{checkpoint} is a 'own_moe', which code of its own defines: configuration_own.py, modeling_own.py"
    with refused(what, TRUST):
        load(checkpoint)
    assert not ran.exists()
    load(checkpoint, trust_remote_code=True)
    assert ran.exists()


def test_trusted_it_computes_what_it_says(own_checkpoint):
    model, mixtral = load_trusted(own_checkpoint), TINY["mixtral"]()
    inputs = example_inputs(mixtral, batch=2, sequence=5, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, 2 * mixtral(**inputs).logits)
    assert [layer.num_experts for layer in find_moe_layers(model)] == [8, 8]


def test_every_loader_gives_the_same_model(own_checkpoint):
    whole = load_trusted(own_checkpoint).state_dict()
    stored = StoredParameters(own_checkpoint, torch.float32, trust_remote_code=True)
    for model in (
        load_skeleton(own_checkpoint, trust_remote_code=True),
        load_empty(own_checkpoint, torch.float32, trust_remote_code=True),
    ):
        assert type(model).__name__ == "OwnForCausalLM"
        assert model.state_dict().keys() == whole.keys() == set(stored)
    assert all(torch.equal(stored[name], value) for name, value in whole.items())


def test_the_files_that_run_are_listed_with_their_hashes(checkpoint):
    assert own_code(checkpoint) == {name: sha256_text(text) for name, text in FILES.items()}
    edit_config(checkpoint, auto_map={**AUTO_MAP, "AutoTokenizer": ["elsewhere.Slow", None], "AutoModel": "lost.Other"})
    assert set(own_code(checkpoint)) == set(FILES)
    edit_config(checkpoint, auto_map=None)
    assert own_code(checkpoint) == {}


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("other/repo--modeling_own.OwnForCausalLM", "code of another repository"),
        ("../modeling_own.OwnForCausalLM", "which is no class in a file"),
        ("/etc/modeling_own.OwnForCausalLM", "which is no class in a file"),
        ("modeling_own", "which is no class in a file"),
        (["modeling_own.OwnForCausalLM"], "which is no class in a file"),
    ],
)
def test_code_of_elsewhere_is_refused_even_when_trusted(reference, reason, checkpoint):
    edit_config(checkpoint, auto_map={**AUTO_MAP, "AutoModelForCausalLM": reference})
    with refused(f"auto_map in {checkpoint / 'config.json'} names {reference!r}, {reason}", HERE):
        load_trusted(checkpoint)


def test_a_name_in_the_config_leads_nowhere_else(checkpoint):
    edit_config(checkpoint, _name_or_path="other/repo")
    assert type(load_trusted(checkpoint)).__name__ == "OwnForCausalLM"
    assert type(load_skeleton(checkpoint, trust_remote_code=True)).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize("imported", ["lost", "../lost", "folder.lost"])
def test_a_file_that_is_missing_or_elsewhere_is_refused(imported, checkpoint):
    (checkpoint.parent / "lost.py").touch()
    (checkpoint / "modeling_own.py").write_text(f"from .{imported} import Lost\n{MODELING}")
    path = checkpoint / f"{imported}.py"
    with refused(f"{path} is missing, which code of {checkpoint} needs", HERE):
        load_trusted(checkpoint)


def test_an_auto_map_that_is_none_is_refused(checkpoint):
    edit_config(checkpoint, auto_map=["modeling_own.OwnForCausalLM"])
    what = f"auto_map in {checkpoint / 'config.json'} holds a list, expected a JSON object"
    with refused(what, "get the checkpoint again, complete"):
        load_trusted(checkpoint)


@pytest.mark.parametrize("wrong", ["import no_such_package\n", "1 / 0\n", "def half(:\n"])
def test_code_that_fails_is_a_clear_error(wrong, checkpoint):
    (checkpoint / "modeling_own.py").write_text(wrong + MODELING)
    with pytest.raises(UserError, match=f"^{re.escape(str(checkpoint))} cannot be loaded: ") as caught:
        load_trusted(checkpoint)
    assert caught.value.hint.startswith("its own code may be for another transformers than ")


def test_where_transformers_has_the_family_the_code_beside_it_runs_only_when_asked_for(checkpoint):
    shutil.rmtree(checkpoint)
    save_model(TINY["mixtral"](), checkpoint)
    edit_config(checkpoint, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    (checkpoint / "modeling.py").write_text("raise SystemError('it ran')")
    assert type(load_model(checkpoint)).__module__.startswith("transformers.")
    with pytest.raises(UserError, match="cannot be loaded: it ran"):
        load_trusted(checkpoint)


OF_NO_FAMILY = """
from transformers import MixtralConfig, PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own_moe"
    def __init__(self, **values):
        mixtral = MixtralConfig(**values).to_dict()
        super().__init__(**{**mixtral, **values, "model_type": "own_moe"})
"""


def test_code_that_extends_no_family_names_the_one_that_it_is_like(checkpoint):
    (checkpoint / "configuration_own.py").write_text(OF_NO_FAMILY)
    with pytest.raises(UserError, match=r"^model_type 'own_moe' is no MoE family that moe-edge knows"):
        load_trusted(checkpoint)
    edit_config(checkpoint, moe_family="mixtral")
    assert [layer.num_experts for layer in find_moe_layers(load_trusted(checkpoint))] == [8, 8]


def test_experts_that_are_not_behind_the_interface_are_refused_by_name(checkpoint):
    plain = "self.model.layers[1].mlp.experts = __import__('torch').nn.ModuleList()"
    own = MODELING.replace(
        "    def forward",
        f"    def __init__(self, config):\n        super().__init__(config)\n        {plain}\n\n    def forward",
    )
    (checkpoint / "modeling_own.py").write_text(own)
    what = (
        "the experts of layer model.layers.1.mlp are a ModuleList, which is not behind transformers' experts interface"
    )
    hint = (
        "without --trust-remote-code transformers' own class is taken, where it has one; or say in three lines of "
        "Python what a block computes, see models/plain.py"
    )
    with refused(what, hint):
        find_moe_layers(load_skeleton(checkpoint, trust_remote_code=True))


def test_files_travel_as_far_as_they_are_there(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (checkpoint / "configuration_own.py").unlink()
    copy_code(checkpoint, tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"modeling_own.py": MODELING}
