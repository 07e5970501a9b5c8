"""Experts that choose their tokens: planned without data, pruned, exported, built; and refused where tokens should."""

import json

import numpy as np
import pytest
import torch

from models.checkpoints import load_model
from moe_spec.plan import PruningPlan
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.cli.fine_tuned import save_fine_tuned
from tests.cli.helpers import done, invoke, leftovers
from tests.models_table import example_inputs, vmoe_expert_choice
from tests.oracle import masked

GROWN = {"layers.0.mlp": (0, 1, 2), "layers.1.mlp": (3, 5, 7)}
"""Experts whose router rows become longer."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model before and after fine-tuning, a plan by the change of its routers, its export, and a data set."""
    directory = tmp_path_factory.mktemp("choice")
    ranked = save_fine_tuned(vmoe_expert_choice(), GROWN, directory)
    done("plan", directory / "tuned", *ranked, "-o", directory / "plan.json")
    done("export", directory / "tuned", "--plan", directory / "plan.json", "-o", directory / "exported")
    return directory


def test_a_pruned_graph_is_the_model_whose_dropped_experts_are_improbable(work):
    plan, model = PruningPlan.load(work / "plan.json"), load_model(work / "tuned")
    assert {layer.name: layer.keep for layer in plan.layers} == GROWN
    batches = [example_inputs(model, count, 0, seed=count) for count in (1, 3, 7)]
    feeds = [{"pixel_values": batch["pixel_values"].numpy()} for batch in batches]
    found = OnnxRuntimeRunner(threads=1).run(work / "exported" / "model.onnx", feeds)
    for batch, outputs in zip(batches, found, strict=True):
        with torch.no_grad(), masked(model, plan):
            np.testing.assert_allclose(outputs["logits"], model(**batch).logits, rtol=0, atol=1e-5)


def test_the_manifest_and_inspect_name_the_form(work):
    assert done("inspect", work / "exported").splitlines()[1:] == [
        f"  {name}: 3 experts, K=1, VMoeExpertChoiceRouter; form expert_choice, 38,208 bytes" for name in GROWN
    ]
    blocks = json.loads((work / "exported" / "manifest.json").read_text())["blocks"]
    assert {block["name"]: tuple(block["keep"]) for block in blocks} == GROWN


def test_a_pruned_checkpoint_keeps_its_capacity_and_recovers(work, tmp_path):
    done("prune", work / "tuned", "--plan", work / "plan.json", "-o", tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (config["num_experts"], config["expert_capacity"]) == (3, 2)
    quick = ("--recipe", "router-norm-cifar", "--steps", 3, "--batch-size", 8)
    done("finetune", tmp_path / "pruned", "--data", work / "task.npz", *quick, "-o", tmp_path / "recovered")


def test_an_engine_is_built_from_the_export(work, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    done("build", work / "exported", "--target", "rtx-ada", "-o", tmp_path / "engine")


NO_TOKEN_CHOOSES = (
    "error: in layer layers.0.mlp experts choose their tokens, but what is looked at are tokens that choose experts\n"
    "hint: plan without data: --criterion router-norm, aimer or random; fine-tune with --method plain or router-kd\n"
)
NO_READER = (
    "error: {work}/exported/model.onnx: in layer layers.0.mlp experts choose their tokens, which no reader takes\n"
    "hint: plan for the checkpoint, and export what is left: moe-edge export CHECKPOINT --plan plan.json; targets take "
    "it as it is\n"
)
NO_CHOICE = (
    "error: layer layers.0.mlp keeps 1 expert, which would choose tokens by a softmax that is 1 for all of them\n"
    "hint: keep at least 2: --keep 2\n"
)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("calibrate", "tuned", "--data", "task.npz"), NO_TOKEN_CHOOSES),
        (("plan", "tuned", "--data", "task.npz", "--keep", "3"), NO_TOKEN_CHOOSES),
        (("plan", "tuned", "--data", "task.npz", "--criterion", "naee", "--keep", "3"), NO_TOKEN_CHOOSES),
        (("finetune", "tuned", "--data", "task.npz", "--method", "seer"), NO_TOKEN_CHOOSES),
        (("finetune", "tuned", "--data", "task.npz", "--method", "task-specific"), NO_TOKEN_CHOOSES),
        (("plan", "tuned", "--criterion", "random", "--keep", "1"), NO_CHOICE),
        (("plan", "tuned", "--experts", "4"), NO_CHOICE),
        (
            ("plan", "tuned", "--criterion", "random", "--keep", "3", "--router", "full"),
            "error: in layer layers.0.mlp experts choose their tokens: an expert that goes chooses none, so its row "
            "goes too\nhint: plan with --router rows\n",
        ),
        (("optimize", "exported", "--target", "rtx-ada"), NO_READER),
        (("plan", "exported", "--criterion", "random", "--keep", "2"), NO_READER),
    ],
)
def test_what_wants_tokens_that_choose_is_refused(arguments, error, work, tmp_path):
    verb, source, *rest = arguments
    named = [work / text if text == "task.npz" else text for text in rest]
    out = tmp_path / "out.safetensors"
    assert invoke(verb, work / source, *named, "-o", out) == (1, "", error.format(work=work))
    assert leftovers(tmp_path) == set()


def test_a_share_that_means_one_expert_is_refused_too(work, tmp_path):
    ranked = ("--criterion", "aimer", "--keep", "10%")
    assert invoke("plan", work / "tuned", *ranked, "-o", tmp_path / "plan.json") == (1, "", NO_CHOICE)
