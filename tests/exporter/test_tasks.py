import numpy as np
import pytest
from transformers import MixtralConfig, ViTConfig

from exporter.tasks import TASKS, task_of
from moe_spec.errors import UserError


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
        task_of("MixtralModel")
    assert refusal.value.what == "MixtralModel is none of the model kinds that are exported"
    assert refusal.value.hint == f"known: *{', *'.join(sorted(TASKS))}"
