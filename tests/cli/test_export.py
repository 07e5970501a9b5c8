import json
import re
import shutil
from typing import Any

import numpy as np
import pytest

from models.checkpoints import save_model
from models.vmoe.assets import fashion_mnist
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.cli.helpers import invoke, leftovers
from tests.models_table import TINY


def plan_for(checkpoint, path, **layer):
    fields: dict[str, Any] = {"name": "layers.3.mlp", "experts": 8, "top_k": 2, "keep": (0, 4, 7)} | layer
    PruningPlan(checkpoint_sha256(checkpoint), "by hand", (LayerPlan(**fields),)).save(path)
    return path


def refusal(what, hint):
    return 1, "", f"error: {what}\nhint: {hint}\n"


def test_the_embedded_model_is_exported_and_one_line_says_so(tmp_path):
    out = tmp_path / "exported"
    code, stdout, stderr = invoke("export", fashion_mnist(), "-o", out, "--opset", 23)
    assert (code, stderr) == (0, "")
    assert re.fullmatch(rf"{out}: 2 MoE layers, opset 23, differs from torch by at most \d\.\de-0[67]\n", stdout)
    manifest = Manifest.load(out)
    manifest.check_files(out)
    assert (manifest.source_sha256, manifest.details["opset"]) == (checkpoint_sha256(fashion_mnist()), 23)
    assert "preprocessor_config.json" in leftovers(out)


def test_json_holds_the_manifest_of_an_export_that_is_pruned_behind_a_full_router(zoo, tmp_path):
    checkpoint, out = zoo.checkpoint("vmoe"), tmp_path / "exported"
    plan = plan_for(checkpoint, tmp_path / "plan.json", router="full")
    code, stdout, stderr = invoke("export", checkpoint, "--plan", plan, "-o", out, "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout) == json.loads(json.dumps(Manifest.load(out).to_json()))
    assert [block["keep"] for block in json.loads(stdout)["blocks"]] == [list(range(8)), [0, 4, 7]]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    nothing, file, empty, bare = (tmp_path / name for name in ("nothing", "file", "empty", "bare"))
    file.touch()
    empty.mkdir()
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    for source, what, hint in (
        (nothing, "does not exist, expected a checkpoint directory", "check the path"),
        (file, "is a file, expected a checkpoint directory", "give a directory with config.json and *.safetensors"),
        (
            empty,
            "is no checkpoint: it has no config.json",
            "give a directory in transformers' layout: config.json and *.safetensors",
        ),
        (bare, "holds no *.safetensors", "give a checkpoint with safetensors weights"),
    ):
        assert invoke("export", source, "-o", tmp_path / "out") == refusal(f"{source} {what}", hint)
    assert leftovers(tmp_path) == {"file", "empty", "bare"}


def test_pickled_weights_are_refused_unread(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    save_model(TINY["vmoe"](), checkpoint)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert invoke("export", checkpoint, "-o", tmp_path / "out") == refusal(
        f"{checkpoint} holds pickled weights (pytorch_model.bin), which can run code when they are read",
        "convert them where you trust them: model.save_pretrained(DIR) writes safetensors",
    )


def test_shards_that_are_missing_cut_or_elsewhere_are_refused(zoo, tmp_path):
    checkpoint = shutil.copytree(zoo.checkpoint("vmoe"), tmp_path / "checkpoint")
    index, shard = checkpoint / "model.safetensors.index.json", checkpoint / "model-00001-of-00002.safetensors"
    (checkpoint / "model.safetensors").rename(shard)
    again = "get the checkpoint again, complete"
    index.write_text(json.dumps({"weight_map": {"layers.1.mlp.router.weight": "lost.safetensors"}}))
    assert invoke("export", checkpoint, "-o", tmp_path / "out") == refusal(
        f"{checkpoint / 'lost.safetensors'} is missing, {index.name} names it", again
    )
    index.write_text(json.dumps({"weight_map": {"layers.1.mlp.router.weight": "../shard.safetensors"}}))
    assert invoke("export", checkpoint, "-o", tmp_path / "out") == refusal(
        f"{index} names the file '../shard.safetensors', which lies outside {checkpoint}",
        "a model may only name files in its own directory; get the model from a source you trust",
    )
    index.write_text(json.dumps({"weight_map": {"layers.1.mlp.router.weight": shard.name}}))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, stderr = invoke("export", checkpoint, "-o", tmp_path / "out")
    assert (code, stderr.startswith(f"error: {shard} is no complete safetensors file: ")) == (1, True)
    assert stderr.endswith(f"hint: {again}\n")
    assert leftovers(tmp_path) == {"checkpoint"}


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(zoo, tmp_path):
    checkpoint = zoo.checkpoint("vmoe")
    plan = plan_for(checkpoint, tmp_path / "plan.json")
    options = ("--plan", plan, "--dtype", "fp16", "--max-memory", "1MB", "-o", tmp_path / "out", "--dry-run")
    code, stdout, stderr = invoke("export", checkpoint, *options)
    assert (code, stderr) == (0, "")
    first, *layers, last = stdout.splitlines()
    assert re.fullmatch(rf"{checkpoint}: [\d,]+ bytes of weights; [\d,]+ would be written", first)
    assert layers == ["  layers.1.mlp: 8 experts, K=2", "  layers.3.mlp: 3 experts, K=2"]
    assert re.fullmatch(r"comparing with torch needs [\d,]+ bytes of memory, 1,000,000 may be used", last)
    assert leftovers(tmp_path) == {"plan.json"}


def test_a_dry_run_refuses_what_the_export_refuses(zoo, tmp_path):
    dry = invoke("export", zoo.checkpoint("vmoe"), "--task", "text-generation", "-o", tmp_path / "out", "--dry-run")
    assert dry == refusal(
        "VMoeForImageClassification is made for image-classification, not for text-generation",
        "--task image-classification, or --task feature-extraction for what is below its head",
    )


def test_what_memory_does_not_hold_is_not_compared_and_one_line_says_so(zoo, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = invoke("export", zoo.checkpoint("vmoe"), "-o", out, "--max-memory", "0MB")
    assert (code, stderr) == (0, "")
    weights = Manifest.load(out).details["bound"]["weights"]
    assert stdout == (
        f"{out}: 2 MoE layers, opset 20, {weights} weights bound, experts counted\n"
        "  note: not compared with torch: torch and ONNX Runtime together need 0.0 GB of memory, 0.0 GB may be used; "
        "the same command on a larger machine does it\n"
    )


def test_a_plan_for_another_model_is_refused(zoo, tmp_path):
    mine, other = zoo.checkpoint("vmoe"), zoo.checkpoint("mixtral")
    plan = plan_for(other, tmp_path / "plan.json")
    assert invoke("export", mine, "--plan", plan, "-o", tmp_path / "out") == refusal(
        f"the plan was made for model {checkpoint_sha256(other)[:12]}, "
        f"but {mine} is model {checkpoint_sha256(mine)[:12]}",
        "make a plan for this model with `moe-edge plan`; "
        "if it is the same model exported by another tool: optimize --any-model",
    )
    assert leftovers(tmp_path) == {"plan.json"}


def test_a_plan_for_an_unknown_layer_is_refused(zoo, tmp_path):
    plan = plan_for(zoo.checkpoint("vmoe"), tmp_path / "plan.json", name="layers.2.mlp")
    assert invoke("export", zoo.checkpoint("vmoe"), "--plan", plan, "-o", tmp_path / "out") == refusal(
        "the plan names layer 'layers.2.mlp', which the model does not have",
        "did you mean 'layers.3.mlp'? known: layers.1.mlp, layers.3.mlp",
    )


def test_a_plan_that_keeps_fewer_than_k_is_refused(zoo, tmp_path):
    plan = plan_for(zoo.checkpoint("vmoe"), tmp_path / "plan.json")
    edited = json.loads(plan.read_text())
    edited["layers"][0]["keep"] = [4]
    plan.write_text(json.dumps(edited))
    assert invoke("export", zoo.checkpoint("vmoe"), "--plan", plan, "-o", tmp_path / "out") == refusal(
        "layer layers.3.mlp keeps 1 of 8 experts, but its router selects K=2 a token",
        "keep at least 2: --keep 2; or let K shrink with the layer: --clamp-top-k",
    )


def test_an_output_that_exists_is_left_as_it_is(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert invoke("export", fashion_mnist(), "-o", out) == refusal(
        f"{out} already exists", f"give another -o, or remove it first: rm -r {out}"
    )
    assert leftovers(out) == set()


def test_an_opset_without_gelu_is_a_usage_error(tmp_path):
    assert invoke("export", fashion_mnist(), "-o", tmp_path / "out", "--opset", 17) == (
        2,
        "",
        "error: --opset is '17', expected INT, 20 to 23\nhint: moe-edge export --help\n",
    )
    assert leftovers(tmp_path) == set()


def interrupted(*_):
    raise KeyboardInterrupt


def wrong(self, model, batches, outputs=None):
    return [{"logits": np.zeros((len(batch["pixel_values"]), 10), np.float32)} for batch in batches]


@pytest.mark.parametrize(
    ("run", "code", "message"),
    [
        (interrupted, 130, "interrupted; nothing half-written is left\n"),
        (
            wrong,
            3,
            "verification failed: output logits differs from torch by 1.00e+00 of its range at batch and sequence "
            "(1, 1), allowed is 1e-05\n",
        ),
    ],
    ids=["ctrl-C", "wrong"],
)
def test_an_export_that_ends_early_leaves_nothing(run, code, message, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(OnnxRuntimeRunner, "run", run)
    assert invoke("export", zoo.checkpoint("vmoe"), "-o", tmp_path / "out") == (code, "", message)
    assert leftovers(tmp_path) == set()
