import numpy as np
import pytest
from transformers import MixtralConfig, ViTConfig

from exporter.tasks import MADE_FOR, TASKS, task_of, with_cache
from moe_spec.errors import UserError
from tests.decoders import DECODERS


def test_text_inputs_have_the_sizes_asked_for():
    task = task_of("MixtralForCausalLM")
    feeds = task.example(MixtralConfig(vocab_size=7), 3, 5, np.random.default_rng(0))
    assert {name: (array.shape, array.dtype.name) for name, array in feeds.items()} == {
        "input_ids": ((3, 5), "int64"),
        "attention_mask": ((3, 5), "int64"),
    }
    assert feeds["input_ids"].max() < 7
    assert list(task.axes) == list(feeds)


@pytest.mark.parametrize(("size", "height", "width"), [(12, 12, 12), ([8, 16], 8, 16)])
def test_images_have_the_size_of_the_model(size, height, width):
    config = ViTConfig(image_size=size, num_channels=3)
    feeds = task_of("ViTForImageClassification").example(config, 2, 5, np.random.default_rng(0))
    assert feeds["pixel_values"].shape == (2, 3, height, width)
    assert feeds["pixel_values"].dtype == np.float32


def test_a_model_of_no_known_kind_is_refused():
    with pytest.raises(UserError) as refusal:
        task_of("MixtralForQuestionAnswering")
    assert refusal.value.what == "MixtralForQuestionAnswering is none of the model kinds that are exported"
    assert refusal.value.hint == f"known: *{', *'.join(MADE_FOR)}"


@pytest.mark.parametrize("architecture", ["MixtralModel", "MixtralForCausalLM", "ViTForImageClassification"])
def test_features_are_what_is_below_any_head(architecture):
    task, own = task_of(architecture, "feature-extraction"), task_of(architecture)
    assert (task.outputs, task.headless, task.generates) == (("last_hidden_state",), True, False)
    assert task.axes == own.axes


def test_a_task_that_a_model_is_not_made_for_is_refused():
    with pytest.raises(UserError) as refusal:
        task_of("MixtralForCausalLM", "text-classification")
    assert (refusal.value.what, refusal.value.hint) == (
        "MixtralForCausalLM is made for text-generation, not for text-classification",
        "--task text-generation, or --task feature-extraction for what is below its head",
    )


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match=r"^unknown task 'text-generatoin'\nhint: did you mean 'text-generation'"):
        task_of("MixtralForCausalLM", "text-generatoin")


def test_every_kind_of_model_has_a_task():
    assert set(MADE_FOR.values()) == set(TASKS)


@pytest.mark.parametrize("past", [0, 5])
def test_a_decoder_with_a_cache_is_given_what_it_kept(past):
    model = DECODERS["qwen3_moe"]()
    task = with_cache(task_of("Qwen3MoeForCausalLM"), model)
    feeds = task.example(model.config, 3, 4, np.random.default_rng(0), past=past)
    assert {name: array.shape for name, array in feeds.items()} == {
        "input_ids": (3, 4),
        "attention_mask": (3, past + 4),
        "position_ids": (3, 4),
        **{f"past_key_values.{layer}.{kind}": (3, 2, past, 8) for layer in (0, 1) for kind in ("key", "value")},
    }
    assert set(task.axes) == set(feeds)
    assert feeds["attention_mask"].sum(axis=1).tolist() == [past + 2, past + 4, past + 4]
    assert feeds["position_ids"][:, -1].tolist() == [past + 1, past + 3, past + 3]


def test_other_tasks_have_no_cache():
    task = task_of("MixtralForSequenceClassification")
    assert with_cache(task, DECODERS["mixtral"]()) is task
