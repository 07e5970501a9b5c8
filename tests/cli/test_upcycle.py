import json

import pytest

from models.checkpoints import save_model
from moe_spec.identity import checkpoint_sha256
from tests.cli.helpers import done, invoke, leftovers
from tests.models.dense import llama
from tests.models_table import TINY


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense") / "llama"
    save_model(llama(), directory)
    return directory


def test_upcycle_writes_a_checkpoint_and_one_line(dense, tmp_path):
    out = tmp_path / "moe"
    said = done("upcycle", dense, dense, dense, "-o", out)
    size = (out / "model.safetensors").stat().st_size
    assert said == f"{out}: 3 experts a layer, K=2, {size:,} bytes of weights\n"
    assert "model.layers.1.mlp: 3 experts, K=2" in done("inspect", out)


def test_json_names_the_new_model(dense, tmp_path):
    out = tmp_path / "moe"
    payload = json.loads(done("upcycle", dense, "--top-k", 1, "--seed", 3, "-o", out, "--json"))
    assert payload == {
        "output": str(out),
        "model_sha256": checkpoint_sha256(out),
        "weight_bytes": (out / "model.safetensors").stat().st_size,
    }


def test_what_is_no_dense_decoder_is_refused_before_anything_is_written(tmp_path):
    save_model(TINY["olmoe"](), tmp_path / "olmoe")
    assert invoke("upcycle", tmp_path / "olmoe", "--top-k", 1, "-o", tmp_path / "moe") == (
        1,
        "",
        "error: the olmoe model cannot become a Mixtral, whose layers are others\n"
        "hint: give a dense decoder of model_type llama or mistral\n",
    )
    assert leftovers(tmp_path) == {"olmoe"}
