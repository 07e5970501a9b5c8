"""config.json beside an ONNX file: somebody else wrote it."""

import json
import re

import pytest

from graph_passes.config_file import EXPERT_COUNT_KEYS, TOP_K_KEYS, write_config
from graph_passes.optimize import optimize
from models.families import FAMILIES
from moe_spec.errors import UserError
from moe_spec.manifest import BlockEntry
from tests.graph_passes.block_models import Spec, save
from tests.heard import Heard
from tests.zoo import RUNNER

LAYERS = [BlockEntry(f"layers.{index}.mlp", 3, 1, (0, 2, 5), "softmax, top-k", "dense", 0) for index in range(2)]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'{"num_experts": 8', r"is no complete JSON: Expecting ',' delimiter: line 1 column 18 \(char 17\)"),
        (b"[8]", "holds a list, expected a JSON object"),
        (b'{"name": "\xff"}', "is no complete JSON: 'utf-8' codec can't decode byte 0xff .*"),
    ],
    ids=["cut", "a list", "no text"],
)
def test_one_that_is_none_is_refused_before_any_work(tmp_path, text, what):
    save(Spec(), tmp_path / "block.onnx")
    (tmp_path / "config.json").write_bytes(text)
    heard = Heard()
    with pytest.raises(UserError) as error:
        optimize(tmp_path / "block.onnx", tmp_path / "out", RUNNER, form="dense", on_progress=heard)
    assert re.fullmatch(f"{re.escape(str(tmp_path / 'config.json'))} {what}", error.value.what)
    assert error.value.hint == "mend it, or remove it"
    assert heard.to_the_end() == []
    assert not (tmp_path / "out").exists()


def written(folder, config, blocks, **options):
    """What becomes of ``config``."""
    source, target = folder / "source", folder / "target"
    for directory in (source, target):
        directory.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config))
    write_config(source, target, blocks, **options)
    return json.loads((target / "config.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_counts_of_every_family_are_known(name):
    row = FAMILIES[name]
    assert row.experts_key in EXPERT_COUNT_KEYS
    assert row.top_k_key in (*TOP_K_KEYS, "")


def test_counts_are_new_where_the_language_model_has_them(tmp_path):
    counts, new = {"num_experts": 8, "moe_topk": 2, "hidden_size": 64}, {"num_experts": 3, "moe_topk": 1}
    config = {"model_type": "x", "thinker_config": {"text_config": counts}, "ffn_config": counts, "text_config": None}
    made = written(tmp_path, config, LAYERS)
    per_layer = {f"layers.{index}.mlp": {"experts": 3, "top_k": 1} for index in range(2)}
    changed = {"thinker_config": {"text_config": counts | new}, "ffn_config": counts | new, "moe_edge": per_layer}
    assert made == config | changed


def test_counts_of_all_layers_stay_where_one_has_others(tmp_path):
    config = {"num_experts": 8, "moe_k": 2, "moe_num_experts": [8, 4]}
    uneven = [LAYERS[0], BlockEntry("layers.1.mlp", 4, 1, (0, 1, 2, 3), "softmax, top-k", "dense", 0)]
    assert written(tmp_path / "uneven", config, uneven)["num_experts"] == 8
    left_alone = written(tmp_path / "partial", config, LAYERS, are_all=False)
    assert (left_alone["num_experts"], left_alone["moe_k"]) == (8, 2)
    even = written(tmp_path / "even", config, LAYERS)
    assert (even["num_experts"], even["moe_k"], even["moe_num_experts"]) == (3, 1, [8, 4])
