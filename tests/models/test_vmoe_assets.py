import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from models import vmoe
from models.vmoe.assets import fashion_mnist
from models.vmoe.card import model_card
from models.vmoe.evaluate import evaluate
from models.vmoe.idx import CLASSES, FILES
from moe_spec.dataset import load_dataset
from moe_spec.identity import checkpoint_sha256
from moe_spec.images import FILE_NAME as PREPROCESSOR
from moe_spec.images import ImagePreprocessor


@pytest.fixture(scope="module")
def recipe():
    return json.loads((fashion_mnist() / "recipe.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shipped():
    return load_dataset(fashion_mnist() / "test.npz", fashion_mnist())


@pytest.fixture(scope="module")
def evaluation(shipped):
    vmoe.register()
    model = AutoModelForImageClassification.from_pretrained(fashion_mnist(), local_files_only=True)
    return evaluate(model, torch.from_numpy(shipped.feeds["pixel_values"]), torch.from_numpy(shipped.labels))


def test_the_shipped_model_is_as_accurate_as_its_recipe_says(recipe, evaluation):
    assert evaluation.accuracy == recipe["accuracy"]["test.npz"]
    assert recipe["accuracy"]["official_test_split"] > 0.91


def test_every_expert_does_some_of_the_work(recipe, evaluation):
    for load in (recipe["expert_load"], evaluation.expert_load):
        assert sorted(load) == ["layers.1.mlp", "layers.3.mlp"]
        for shares in load.values():
            assert len(shares) == 8
            assert sum(shares) == pytest.approx(1, abs=1e-3)
            assert min(shares) > 0.02


def test_the_images_are_class_balanced_and_the_two_cuts_are_distinct(shipped):
    calibration = load_dataset(fashion_mnist() / "calibration.npz", fashion_mnist())
    for data in (calibration, shipped):
        assert data.feeds["pixel_values"].shape == (1000, 1, 28, 28)
        assert data.labels is not None
        assert np.bincount(data.labels).tolist() == [100] * len(CLASSES)
    seen = {image.tobytes() for image in calibration.feeds["pixel_values"]}
    assert sum(image.tobytes() in seen for image in shipped.feeds["pixel_values"]) == 0


def test_the_assets_stay_small():
    sizes = {path.name: path.stat().st_size for path in fashion_mnist().iterdir()}
    assert sizes["model.safetensors"] < 2_000_000
    assert sizes["calibration.npz"] + sizes["test.npz"] < 1_000_000
    assert sum(sizes.values()) < 3_000_000


def test_the_recipe_names_seed_versions_and_data(recipe):
    assert sorted(recipe["dataset_sha256"]) == sorted(FILES)
    assert sorted(recipe["versions"]) == ["numpy", "python", "torch", "transformers"]
    assert (recipe["seed"], recipe["threads"]) == (0, 1)


def test_the_model_card_says_what_was_measured(recipe):
    assert (fashion_mnist() / "README.md").read_text(encoding="utf-8") == model_card(recipe)


@pytest.mark.parametrize("left_out", [(), ("do_normalize",), ("do_rescale",), ("do_normalize", "do_rescale")])
def test_the_preprocessor_is_the_one_that_transformers_makes_of_the_same_file(left_out, tmp_path):
    with np.load(fashion_mnist() / "test.npz") as archive:
        images = archive["images"][:8]
    config = json.loads((fashion_mnist() / PREPROCESSOR).read_text(encoding="utf-8"))
    (tmp_path / PREPROCESSOR).write_text(json.dumps(config | dict.fromkeys(left_out, False)), encoding="utf-8")
    preprocess = ImagePreprocessor.load(tmp_path)
    assert preprocess is not None
    processor = AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    theirs = processor([Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    largest = 255 if "do_rescale" in left_out else 1
    np.testing.assert_allclose(preprocess(images, "test.npz"), theirs, rtol=0, atol=1e-6 * largest)


def test_the_directory_is_a_checkpoint():
    assert len(checkpoint_sha256(fashion_mnist())) == 64


def test_finding_the_assets_needs_no_torch():
    code = "import models, models.vmoe, models.vmoe.assets as a, sys; a.fashion_mnist(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
