import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints import save_model
from moe_spec.calibration import Shards
from moe_spec.identity import checkpoint_sha256
from moe_spec.manifest import MODEL
from moe_spec.statistics import KEYS, Statistics
from tests.cli.helpers import INTERRUPTIBLE, invoke, leftovers
from tests.models_table import TINY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "mixtral"
    save_model(TINY["mixtral"](), directory)
    return directory


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, input_ids=np.random.default_rng(0).integers(0, 128, (6, 5)))
    return path


def test_calibrate_writes_statistics_and_one_line(checkpoint, data, tmp_path):
    out = tmp_path / "statistics.safetensors"
    code, stdout, stderr = invoke("calibrate", checkpoint, "--data", data, "-o", out, "--batch-size", 4, "--limit", 5)
    assert (code, stdout, stderr) == (0, f"{out}: 2 MoE layers, 25 tokens each\n", "")
    assert Statistics.load(out).layers[1].token_count == 25


def test_dense_statistics_are_taken_when_asked_for(checkpoint, data, tmp_path):
    out, dense = tmp_path / "statistics.safetensors", tmp_path / "dense.safetensors"
    assert invoke("calibrate", checkpoint, "--data", data, "-o", out)[0] == 0
    assert invoke("calibrate", checkpoint, "--data", data, "-o", dense, "--dense")[0] == 0
    assert set(Statistics.load(out).layers[0].sums) == {name for name, key in KEYS.items() if not key.dense}
    assert set(Statistics.load(dense).layers[0].sums) == set(KEYS)


def test_json_goes_to_stdout(checkpoint, data, tmp_path):
    out = tmp_path / "statistics.safetensors"
    code, stdout, stderr = invoke("calibrate", checkpoint, "--data", data, "-o", out, "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout) == {
        "output": str(out),
        "model_sha256": checkpoint_sha256(checkpoint),
        "data_sha256": list(Statistics.load(out).data_sha256),
        "layers": [
            {"name": f"model.layers.{index}.mlp", "experts": 8, "top_k": 2, "token_count": 30} for index in (0, 1)
        ],
    }


def test_what_cannot_be_read_ends_in_an_error_and_a_hint(checkpoint, data, tmp_path):
    out, nothing = tmp_path / "out.safetensors", tmp_path / "nothing"
    assert invoke("calibrate", nothing, "--data", data, "-o", out) == (
        1,
        "",
        f"error: {nothing} does not exist, expected a checkpoint directory\nhint: check the path\n",
    )
    assert invoke("calibrate", checkpoint, "--data", nothing, "-o", out) == (
        1,
        "",
        f"error: {nothing} does not exist, expected task data (.npz)\nhint: check the path\n",
    )
    assert invoke("calibrate", checkpoint, "--data", data, "-o", data)[2].startswith(f"error: {data} already exists\n")
    assert leftovers(tmp_path) == {"data.npz"}


def test_pickled_objects_in_data_are_never_read(checkpoint, tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, input_ids=np.array([{"a": 1}], dtype=object))
    code, _, stderr = invoke("calibrate", checkpoint, "--data", path, "-o", tmp_path / "out.safetensors")
    assert code == 1
    assert stderr == (
        f"error: {path} is no readable .npz: Object arrays cannot be loaded when allow_pickle=False\n"
        "hint: write it with numpy.savez_compressed; pickled objects are never read\n"
    )


@pytest.mark.parametrize("option", ["--batch-size", "--limit"])
def test_a_count_of_zero_is_a_usage_error(option, checkpoint, data, tmp_path):
    assert invoke("calibrate", checkpoint, "--data", data, "-o", tmp_path / "out", option, 0)[0] == 2


def test_ctrl_c_while_writing_leaves_nothing(checkpoint, data, tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", half)
    arguments = ("calibrate", checkpoint, "--data", data, "-o", tmp_path / "out.safetensors")
    assert invoke(*arguments) == (130, "", "interrupted; nothing half-written is left\n")
    assert leftovers(tmp_path) == {"data.npz"}


INTERRUPTED = """
import os, signal, sys
import pruning.calibrate
from cli.main import main

def tensors(*arguments, original=pruning.calibrate.tensors_of):
    os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments)

pruning.calibrate.tensors_of = tensors
main(["calibrate", *sys.argv[1:]], verbs=["calibrate"])
"""


def test_a_real_interrupt_in_the_middle_of_a_pass_leaves_nothing(checkpoint, data, tmp_path, commands):
    arguments = [
        commands / "python",
        "-c",
        INTERRUPTIBLE + INTERRUPTED,
        checkpoint,
        "--data",
        data,
        "-o",
        tmp_path / "out.safetensors",
    ]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted; nothing half-written is left\n"
    assert leftovers(tmp_path) == {"data.npz"}


KILLED_AT_THE_THIRD_BATCH = """
import os, signal, sys
import torch
import pruning.calibrate
from cli.main import main

torch.set_num_threads(1)  # as the other run has: with more, some machines sum in another order
batches = []

def tensors(*arguments, original=pruning.calibrate.tensors_of):
    batches.append(1)
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

pruning.calibrate.tensors_of = tensors
main(["calibrate", *sys.argv[1:]], verbs=["calibrate"])
"""


def test_a_run_that_was_killed_goes_on_from_its_last_shard(checkpoint, data, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    shards = tmp_path / "out.safetensors.shards"
    arguments = [checkpoint, "--data", data, "--batch-size", 1]
    assert invoke("calibrate", *arguments, "-o", whole)[0] == 0
    sharded = [*arguments, "-o", out, "--shard-size", 2]
    command = [sys.executable, "-c", KILLED_AT_THE_THIRD_BATCH, *map(str, sharded)]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -9
    assert leftovers(tmp_path) == {"data.npz", whole.name, shards.name}
    assert leftovers(shards) == {"run.json", "process0-000000000002.safetensors"}
    assert invoke("calibrate", *sharded, "--batch-size", 2) == (
        1,
        "",
        f"error: {shards} holds the shards of a run with batch_size 1, this one has 2\n"
        f"hint: run the command as it was, or start anew: rm -r {shards}\n",
    )
    assert invoke("calibrate", *sharded) == (0, f"{out}: 2 MoE layers, 30 tokens each\n", "")
    assert out.read_bytes() == whole.read_bytes()
    assert leftovers(tmp_path) == {"data.npz", whole.name, out.name}


def test_ctrl_c_says_where_the_run_would_go_on(checkpoint, data, tmp_path, monkeypatch):
    def interrupted(self, done, layers, keep=Shards.keep):
        keep(self, done, layers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "keep", interrupted)
    arguments = ("calibrate", checkpoint, "--data", data, "-o", tmp_path / "out", "--batch-size", 2, "--shard-size", 2)
    assert invoke(*arguments) == (
        130,
        "",
        f"· {tmp_path}/out.shards keeps what is done; the same command goes on from there\n"
        "interrupted; nothing half-written is left\n",
    )
    assert leftovers(tmp_path / "out.shards") == {"run.json", "process0-000000000002.safetensors"}


def test_a_device_map_changes_nothing_but_the_place(checkpoint, data, tmp_path):
    here, spread = tmp_path / "here.safetensors", tmp_path / "spread.safetensors"
    for arguments in ((here,), (spread, "--device-map", "auto", "--max-memory", "100KB")):
        assert invoke("calibrate", checkpoint, "--data", data, "-o", *arguments)[0] == 0
    assert here.read_bytes() == spread.read_bytes()
    assert leftovers(tmp_path) == {"data.npz", here.name, spread.name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--max-memory", "4GB"),
            "error: --max-memory is for a model that is spread over devices\nhint: spread it: --device-map auto\n",
        ),
        (
            ("--max-memory", "a lot", "--device-map", "auto"),
            "error: --max-memory a lot is no amount of memory\nhint: for example 4GB, 900MB or 4GiB\n",
        ),
    ],
)
def test_memory_that_cannot_be_given_is_refused(options, message, checkpoint, data, tmp_path):
    assert invoke("calibrate", checkpoint, "--data", data, "-o", tmp_path / "out.safetensors", *options) == (
        1,
        "",
        message,
    )
    assert leftovers(tmp_path) == {"data.npz"}


def test_a_device_map_without_accelerate_says_what_to_install(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    arguments = ("calibrate", checkpoint, "--data", data, "-o", tmp_path / "out.safetensors", "--device-map", "auto")
    assert invoke(*arguments) == (
        1,
        "",
        "error: this needs accelerate, which is not installed\nhint: pip install 'moe-edge[prune]'\n",
    )
    assert leftovers(tmp_path) == {"data.npz"}


def test_an_onnx_model_is_calibrated_as_its_checkpoint(zoo, data, tmp_path):
    directory, out = tmp_path / "directory.safetensors", tmp_path / "file.safetensors"
    for source, written in ((zoo.exported("mixtral"), directory), (zoo.exported("mixtral") / MODEL, out)):
        arguments = ("calibrate", source, "--data", data, "-o", written)
        assert invoke(*arguments) == (0, f"{written}: 2 MoE layers, 30 tokens each\n", "")
    assert out.read_bytes() == directory.read_bytes()
    assert Statistics.load(out).model_sha256 == checkpoint_sha256(zoo.checkpoint("mixtral"))


@pytest.mark.parametrize("options", [("--dense",), ("--device-map", "auto"), ("--max-memory", "4GB"), ()])
def test_what_only_checkpoints_have_is_refused_for_an_onnx_model(options, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert invoke("calibrate", "model.onnx", "--data", data, "-o", tmp_path / "out.safetensors", *options) == (
        1,
        "",
        f"error: {[*options, 'torchrun'][0]} is for checkpoints, model.onnx is an ONNX model\n"
        "hint: calibrate the checkpoint, or parts of the data one by one: moe-edge merge adds them up\n",
    )
