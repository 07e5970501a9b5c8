import gzip
import re
import struct

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from models import vmoe
from models.vmoe.augment import flip_and_shift
from models.vmoe.configuration import VMoeConfig
from models.vmoe.fit import Recipe, parameter_groups
from models.vmoe.idx import CLASSES, FILES, HINT
from models.vmoe.modeling import VMoeForImageClassification
from models.vmoe.train import main, train
from moe_spec.dataset import load_dataset
from moe_spec.errors import UserError

TINY = Recipe(epochs=2, batch_size=32, warmup_epochs=1)


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def data(tmp_path):
    """Sixty and thirty images whose class is the row that is lit, in Fashion-MNIST's files."""
    directory = tmp_path / "data"
    directory.mkdir()
    for split, count in (("train", 60), ("t10k", 30)):
        labels = np.arange(count, dtype=np.uint8) % len(CLASSES)
        images = np.zeros((count, 28, 28), np.uint8)
        images[np.arange(count), 4 + 2 * labels] = 255
        write_idx(directory / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(directory / f"{split}-labels-idx1-ubyte.gz", labels)
    return directory


def test_the_recipe_ends_in_a_directory_that_loads(data, tmp_path):
    lines: list[str] = []
    output = tmp_path / "model"
    written = train(data, output, TINY, examples_shipped=20, report=lines.append)
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "calibration.npz",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.json",
        "test.npz",
    ]
    vmoe.register()
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.id2label == dict(enumerate(CLASSES))
    test = load_dataset(output / "test.npz", output)
    correct = model(torch.from_numpy(test.feeds["pixel_values"])).logits.argmax(-1).numpy() == test.labels
    assert written["accuracy"]["test.npz"] == round(float(correct.mean()), 6)
    assert test.labels is not None
    assert np.bincount(test.labels).tolist() == [2] * len(CLASSES)
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]


def test_the_same_seed_gives_the_same_bytes(data, tmp_path):
    for name in ("once", "again"):
        train(data, tmp_path / name, TINY, examples_shipped=20)
    train(data, tmp_path / "other", Recipe(seed=1, epochs=2, batch_size=32, warmup_epochs=1), examples_shipped=20)
    once, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again", "other"))
    assert once == again
    assert once != other
    assert (tmp_path / "once" / "test.npz").read_bytes() == (tmp_path / "again" / "test.npz").read_bytes()


def test_an_interrupted_run_leaves_nothing(data, tmp_path):
    def interrupt(_line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "model", TINY, examples_shipped=20, report=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_directory_without_the_data_is_refused(tmp_path):
    missing = tmp_path / "train-images-idx3-ubyte.gz"
    message = f"{missing} does not exist, expected a gzipped idx file\nhint: {HINT}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        train(tmp_path, tmp_path / "model", TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"idx", "is no complete gzip file: Not a gzipped file (b'id')"),
        (
            gzip.compress(b"\0\0\x08\x03")[:-9],
            "is no complete gzip file: Compressed file ended before the end-of-stream marker was reached",
        ),
        (gzip.compress(b""), "begins with nothing, expected an idx file of bytes"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\0"), "begins with 00000d01, expected an idx file of bytes"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "is cut in its header"),
        (
            gzip.compress(struct.pack(">I3I", 0x803, 60, 28, 28) + b"pixels"),
            "holds 6 bytes, its header says [60, 28, 28]",
        ),
        (
            gzip.compress(struct.pack(">I3I", 0x803, 1, 2, 3) + b"pixels"),
            "holds images [1, 2, 3] and train-labels-idx1-ubyte.gz labels [60], expected [N, 28, 28] and [N]",
        ),
    ],
    ids=["no gzip", "cut gzip", "empty", "floats", "cut header", "cut pixels", "other images"],
)
def test_a_bad_image_file_is_refused(data, tmp_path, content, what):
    path = data / FILES[0]
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path} {what}')}\nhint: {re.escape(HINT)}$"):
        train(data, tmp_path / "model", TINY)


def test_a_class_that_does_not_exist_is_refused(data, tmp_path):
    path = data / FILES[1]
    write_idx(path, np.full(60, 10, np.uint8))
    message = f"{path} holds class 10, expected classes 0 to 9\nhint: {HINT}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        train(data, tmp_path / "model", TINY)


def test_a_class_too_small_for_the_cut_is_refused(data, tmp_path):
    message = (
        "class 0 (T-shirt/top) has 3 examples, expected at least 4\n"
        "hint: give the whole Fashion-MNIST, or ship fewer examples"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        train(data, tmp_path / "model", TINY, examples_shipped=40)


def test_the_command_ends_in_an_error_and_a_hint(tmp_path, capsys):
    assert main(["--data", str(tmp_path), "-o", str(tmp_path)]) == 1
    expected = f"error: {tmp_path} already exists\nhint: give another -o, or remove it first: rm -r {tmp_path}\n"
    assert capsys.readouterr().err == expected


def test_biases_layernorms_and_positions_are_not_decayed():
    torch.manual_seed(0)
    model = VMoeForImageClassification(VMoeConfig(id2label=dict(enumerate(CLASSES))))
    decayed, kept = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    norms = {p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    expected = {p for p, name in names.items() if p in norms or name.endswith("bias") or "position" in name}
    assert set(kept["params"]) == expected
    assert set(decayed["params"]) == set(names) - expected


def test_augmentation_mirrors_and_shifts_within_bounds():
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.zeros(500, 1, 9, 9)
    images_BCHW[:, :, 4, 4], images_BCHW[:, :, 4, 5] = 1, 2  # a pair of pixels with a left and a right
    moved = flip_and_shift(images_BCHW, 2, -1.0, generator)
    rows, columns = torch.where(moved[:, 0] == 1)[1:]
    right_of_it = torch.where(moved[:, 0] == 2)[2] - columns
    assert (int(rows.min()), int(rows.max())) == (2, 6)
    assert sorted(set(right_of_it.tolist())) == [-1, 1]
    assert (moved == -1).any()
    assert torch.equal(flip_and_shift(images_BCHW, 0, -1.0, generator).abs().sum(), images_BCHW.sum())
