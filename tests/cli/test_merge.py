import json

import numpy as np
import pytest

from moe_spec.statistics import Statistics, merge
from pruning.calibrate import calibrate
from tests.cli.helpers import invoke, leftovers


@pytest.fixture(scope="module")
def shards(zoo, tmp_path_factory):
    """The statistics of three shards of data."""
    directory, written = tmp_path_factory.mktemp("shards"), []
    for index, examples in enumerate((3, 1, 2)):
        data, out = directory / f"{index}.npz", directory / f"{index}.safetensors"
        np.savez(data, input_ids=np.random.default_rng(index).integers(0, 128, (examples, 5)))
        calibrate(zoo.checkpoint("mixtral"), data, out)
        written.append(out)
    return written


def test_shards_are_merged_in_the_order_given(shards, tmp_path):
    out, again = tmp_path / "all.safetensors", tmp_path / "again.safetensors"
    assert invoke("merge", *shards, "-o", out) == (0, f"{out}: 2 MoE layers, 30 tokens each\n", "")
    first, second, third = map(Statistics.load, shards)
    merge(merge(first, second), third).save(again)
    assert out.read_bytes() == again.read_bytes()
    assert Statistics.load(out).data_sha256 == (*first.data_sha256, *second.data_sha256, *third.data_sha256)


def test_json_goes_to_stdout(shards, tmp_path):
    out = tmp_path / "all.safetensors"
    code, stdout, stderr = invoke("merge", shards[0], "-o", out, "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["layers"][1] == {
        "name": "model.layers.1.mlp",
        "experts": 8,
        "top_k": 2,
        "token_count": 15,
    }
    assert out.read_bytes() == shards[0].read_bytes()


def test_what_cannot_be_merged_ends_in_an_error_and_a_hint(zoo, shards, tmp_path):
    other, data, out = tmp_path / "other.safetensors", shards[0].with_suffix(".npz"), tmp_path / "all.safetensors"
    calibrate(zoo.checkpoint("olmoe"), data, other)
    mine, theirs = (Statistics.load(path).model_sha256[:12] for path in (shards[0], other))
    assert invoke("merge", shards[0], other, "-o", out) == (
        1,
        "",
        f"error: statistics of model {mine} cannot be merged with those of {theirs}\n"
        "hint: calibrate every shard with the same checkpoint\n",
    )
    assert invoke("merge", data, "-o", out)[2].startswith(f"error: {data} is no complete safetensors file: ")
    assert invoke("merge", tmp_path / "no", "-o", out) == (
        1,
        "",
        f"error: {tmp_path / 'no'} does not exist, expected statistics (safetensors)\nhint: check the path\n",
    )
    assert invoke("merge", shards[0], "-o", other)[2].startswith(f"error: {other} already exists\n")
    data_sha256 = Statistics.load(shards[1]).data_sha256[0][:12]
    assert invoke("merge", *shards, shards[1], "-o", out) == (
        1,
        "",
        f"error: two of the statistics were taken on the same data {data_sha256}, which would count twice\n"
        "hint: merge each shard once; to share one file among machines, split it before it is calibrated\n",
    )
    assert leftovers(tmp_path) == {other.name}


def test_nothing_to_merge_is_a_usage_error(tmp_path):
    assert invoke("merge", "-o", tmp_path / "all.safetensors")[0] == 2
