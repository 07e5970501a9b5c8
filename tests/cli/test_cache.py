"""A decoder with its cache goes the whole way: exported, pruned, proven, verified, timed, calibrated and built."""

import json
import re

import numpy as np
import pytest

from benchmarks.planted import FAULTS, plant
from models.checkpoints import save_model
from moe_spec.manifest import Manifest, TensorSpec
from moe_spec.statistics import Statistics
from tests.cli.helpers import done, invoke, leftovers
from tests.families.configs import tiny

TRAVELLERS = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"


@pytest.fixture(scope="module")
def pruned(zoo, tmp_path_factory):
    """A directory with task data, and half of the experts of a Mixtral."""
    root = tmp_path_factory.mktemp("cache")
    random = np.random.default_rng(0)
    np.savez(root / "data.npz", input_ids=random.integers(4, 128, (6, 9)))
    done("plan", zoo.cached("mixtral") / "model.onnx", "--experts", "0,2,5,7", "-o", root / "plan.json")
    optimize = ("optimize", zoo.cached("mixtral"), "--plan", root / "plan.json", "--target", "rtx-ada")
    done(*optimize, "-o", root / "optimized")
    return root


def test_the_graph_takes_and_gives_the_cache(zoo, pruned):
    kept = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    for directory in (zoo.cached("mixtral"), pruned / "optimized"):
        manifest = Manifest.load(directory)
        assert manifest.inputs == (
            TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
            TensorSpec("attention_mask", "int64", (BATCH, f"{PAST} + {SEQUENCE}")),
            TensorSpec("position_ids", "int64", (BATCH, SEQUENCE)),
            *(TensorSpec(f"past_key_values.{name}", "float32", (BATCH, 2, PAST, 8)) for name in kept),
        )
        assert manifest.outputs == (
            TensorSpec("logits", "float32", (BATCH, SEQUENCE, 128)),
            *(TensorSpec(f"present.{name}", "float32", (BATCH, 2, f"{PAST} + {SEQUENCE}", 8)) for name in kept),
        )


def test_the_proof_goes_on_from_a_cache_and_begins_without(pruned):
    entries = Manifest.load(pruned / "optimized").details["oracle"]
    assert {entry["shapes"]["past_key_values.0.key"][2] for entry in entries} == {0, 4, 5}
    assert {entry["output"] for entry in entries} >= {"logits", "present.0.key", "present.1.value"}


@pytest.mark.parametrize("data", [(), ("--data", "data.npz")])
def test_it_is_verified_and_the_cache_has_one_line(data, zoo, pruned, monkeypatch):
    monkeypatch.chdir(pruned)
    lines = done("verify", "optimized", "--reference", zoo.cached("mixtral"), *data).splitlines()
    assert lines[0].startswith("PASS")
    assert lines[3].startswith("  logits: ")
    assert re.match(r"  present\.1\.(key|value): differs by .*, cosine -, KL -", lines[4])
    assert lines[5] == "  greedy: 16.0 of 16 tokens are the same on average, at least 16, behind 4 prompts"
    assert len(lines) == 6


def test_what_decoders_write_differs_where_one_of_them_is_broken(zoo, tmp_path):
    broken = plant(zoo.cached("mixtral"), tmp_path / "broken", FAULTS["two experts swapped"], 1)
    out = invoke("verify", broken, "--reference", zoo.cached("mixtral"), "--json", "--greedy-tokens", 8)[1]
    greedy = json.loads(out)["greedy"]
    assert (greedy["prompts"], greedy["tokens"]) == (4, 8)
    assert 0 <= greedy["shortest"] <= greedy["mean"] < 8


def test_it_is_calibrated_as_its_checkpoint_is(zoo, pruned):
    for name, model in (("onnx", zoo.cached("mixtral")), ("torch", zoo.decoder("mixtral"))):
        done("calibrate", model, "--data", pruned / "data.npz", "-o", pruned / f"{name}.safetensors")
    mine, theirs = (Statistics.load(pruned / f"{name}.safetensors") for name in ("onnx", "torch"))
    for ours, other in zip(mine.layers, theirs.layers, strict=True):
        np.testing.assert_allclose(ours["gate"], other["gate"], rtol=1e-4)
        assert ours.token_count == other.token_count == 54


def test_a_prompt_and_a_token_more_are_timed_apart(pruned):
    steps = ("--batch-size", 2, "--length", 8, "--past", 16, "--repeats", 1, "--json")
    prefill, decode = json.loads(done("bench", pruned / "optimized", *steps))["rows"]
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    for row, tokens in ((prefill, 16), (decode, 2)):
        assert row["tokens_per_second"] == pytest.approx(1000 * tokens / row["median_ms"])


def test_what_a_decoder_costs_says_of_which_phase(zoo):
    model = zoo.cached("mixtral")
    text = done("verify", model, "--reference", model, "--cost", "--batch-size", 1, "--greedy-tokens", 0)
    phases = re.findall(rf"^  {re.escape(str(model))} (\w+): [\d.]+ ms for 1 examples", text, re.MULTILINE)
    assert phases == ["prefill", "decode"] * 2


def test_outputs_of_a_run_are_those_of_the_task(pruned):
    text = done("run", pruned / "optimized", "--input", pruned / "data.npz")
    assert text == "6 examples: logits [6, 9, 128]\n"


def test_an_engine_is_built_for_an_empty_cache_and_a_full_one(pruned):
    pytest.importorskip("tensorrt_rtx")
    done("build", pruned / "optimized", "--target", "rtx-ada", "-o", pruned / "engine")
    profile = Manifest.load(pruned / "engine").details["profiles"][0]["past_key_values.0.key"]
    assert (profile["min"], profile["max"]) == ([1, 2, 0, 8], [64, 2, 512, 8])
    for stage in ("optimized", "engine"):
        assert leftovers(pruned / stage) >= TRAVELLERS


def shapes(batch, new, past):
    lengths = {"input_ids": f"{new}", "attention_mask": f"{past + new}", "position_ids": f"{new}"}
    cache = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    lengths |= dict.fromkeys(cache, f"2x{past}x8")
    return ",".join(f"{name}:{batch}x{length}" for name, length in lengths.items())


def test_an_engine_has_a_profile_for_prompts_and_one_for_single_tokens(pruned):
    pytest.importorskip("tensorrt_rtx")
    prompt = [f"--{which}Shapes={shapes(1, new, 0)}" for which, new in (("min", 1), ("opt", 16), ("max", 64))]
    token = [f"--{which}Shapes={shapes(1, 1, past)}" for which, past in (("min", 1), ("opt", 64), ("max", 128))]
    arguments = ("--target", "rtx-ada", "--also", "sm120", "--profile=0", *prompt, "--profile=1", *token)
    summary = done("build", pruned / "optimized", *arguments, "-o", pruned / "two")
    assert "two: rtx-ada, rtx-blackwell, " in summary
    fitted = json.loads(done("targets", pruned / "two", "--json"))["rtx-ada"]
    assert fitted["cache"] == 2 * 2 * (2 * 8 * 4) * (128 + 129)  # layers, keys and values; in and out
    details = Manifest.load(pruned / "two").details
    assert [profile["past_key_values.0.key"]["max"] for profile in details["profiles"]] == [
        [1, 2, 0, 8],
        [1, 2, 128, 8],
    ]


def test_a_cache_that_cannot_be_an_input_can_be_left_out(tmp_path):
    save_model(tiny("deepseek_v4"), tmp_path / "checkpoint")
    message = (
        "error: the model has no cache that can be an input: layer 0 keeps a DeepseekV4HCACache, not one value for "
        "each token\nhint: export it without: moe-edge export --no-cache\n"
    )
    assert invoke("export", tmp_path / "checkpoint", "-o", tmp_path / "out") == (1, "", message)
    assert leftovers(tmp_path) == {"checkpoint"}


def test_a_task_of_other_models_is_refused(zoo, tmp_path):
    message = (
        "error: MixtralForCausalLM is made for text-generation, not for image-classification\n"
        "hint: --task text-generation, or --task feature-extraction for what is below its head\n"
    )
    arguments = ("export", zoo.decoder("mixtral"), "--task", "image-classification", "-o", tmp_path / "out")
    assert invoke(*arguments) == (1, "", message)
