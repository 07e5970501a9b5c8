import numpy as np
import pytest

from models.checkpoints import save_model
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.statistics import Statistics
from pruning.calibrate import calibrate
from pruning.inputs import check_inputs
from tests.families.configs import tiny
from tests.heard import Heard
from tests.models_table import TINY
from tests.pruning.test_collect import assert_same_sums


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "granitemoe"
    save_model(TINY["granitemoe"](), directory)
    return directory


def data_file(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, **arrays)
    return path


def ids(examples=5, sequence=4):
    return np.random.default_rng(0).integers(0, 128, (examples, sequence), dtype=np.int32)


def test_calibrate_writes_what_it_returns(checkpoint, tmp_path):
    data, out, heard = data_file(tmp_path, input_ids=ids(), labels=np.arange(5)), tmp_path / "s.safetensors", Heard()
    statistics = calibrate(checkpoint, data, out, batch_size=2, on_progress=heard)
    assert heard.counts("calibrating") == [(0, 5), (2, 5), (4, 5), (5, 5)]
    loaded = Statistics.load(out)
    assert (loaded.model_sha256, loaded.data_sha256) == (statistics.model_sha256, statistics.data_sha256)
    assert loaded.model_sha256 == checkpoint_sha256(checkpoint)
    assert [layer.token_count for layer in loaded.layers] == [20, 20]
    assert_same_sums(loaded.layers, statistics.layers, rtol=0)


def test_a_limit_takes_the_first_examples(checkpoint, tmp_path):
    data = data_file(tmp_path, input_ids=ids())
    limited = calibrate(checkpoint, data, tmp_path / "limited.safetensors", limit=3)
    first = calibrate(checkpoint, data_file(tmp_path, input_ids=ids()[:3]), tmp_path / "first.safetensors")
    assert_same_sums(limited.layers, first.layers, rtol=0)


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    out = tmp_path / "s.safetensors"
    out.touch()
    with pytest.raises(UserError) as caught:
        calibrate(tmp_path / "no model", tmp_path / "no data", out)
    assert caught.value.what == f"{out} already exists"


VMOE_TAKES = "known: pixel_values"
GRANITE_TAKES = "known: attention_mask, input_ids, position_ids"


@pytest.mark.parametrize(
    ("name", "arrays", "what", "hint"),
    [
        (
            "granitemoe",
            {"input_idz": ids()},
            "data.npz holds the array 'input_idz', which the granitemoe model does not take",
            f"did you mean 'input_ids'? {GRANITE_TAKES}",
        ),
        (
            "granitemoe",
            {"attention_mask": ids()},
            "data.npz lacks the array 'input_ids'",
            "store the model's input as 'input_ids'",
        ),
        (
            "granitemoe",
            {"input_ids": ids().astype(np.float32)},
            "data.npz: input_ids are float32[5, 4], expected integers [N, S]",
            "pad token ids to one length; attention_mask 0 marks the padding",
        ),
        (
            "granitemoe",
            {"input_ids": np.array([[0, 128]])},
            "data.npz: input_ids go from 0 to 128, but the vocabulary has 128 entries",
            "tokenise with the tokenizer of this model",
        ),
        (
            "granitemoe",
            {"input_ids": ids(), "attention_mask": np.ones((5, 3), np.int64)},
            "data.npz: attention_mask is [5, 3], but input_ids are [5, 4]",
            "store one attention_mask entry a token",
        ),
        (
            "granitemoe",
            {"input_ids": ids(), "attention_mask": np.full((5, 4), "1")},
            "data.npz: attention_mask is <U1, expected numbers",
            "store attention_mask as numbers",
        ),
        (
            "granitemoe",
            {"input_ids": ids(), "position_ids": np.ones((5, 4))},
            "data.npz: position_ids is float64, expected integers",
            "store position_ids as integers",
        ),
        (
            "moe_bert",
            {"input_ids": ids(sequence=65)},
            "data.npz: input_ids are [5, 65], but the model takes texts of at most 64 tokens",
            "cut them to 64",
        ),
        (
            "moe_bert",
            {"input_ids": ids(), "token_type_ids": np.full((5, 4), 2)},
            "data.npz: token_type_ids go from 2 to 2, but the model has 2 of them",
            "store token_type_ids from 0 to 1",
        ),
        (
            "moe_bert",
            {"input_ids": ids(), "position_ids": np.full((5, 4), -1)},
            "data.npz: position_ids go from -1 to -1, but the model has 64 of them",
            "store position_ids from 0 to 63",
        ),
        (
            "switch_transformers",
            {"input_ids": ids()},
            "data.npz lacks the array 'decoder_input_ids'",
            "store what the decoder reads beside the input_ids of the encoder",
        ),
        (
            "switch_transformers",
            {"input_ids": ids(), "decoder_input_ids": np.full((5, 3), 128)},
            "data.npz: decoder_input_ids go from 128 to 128, but the vocabulary has 128 entries",
            "tokenise with the tokenizer of this model",
        ),
        (
            "switch_transformers",
            {"input_ids": ids(), "decoder_input_ids": ids()[:, 0]},
            "data.npz: decoder_input_ids are int32[5], expected integers [N, S]",
            "pad token ids to one length; attention_mask 0 marks the padding",
        ),
        (
            "vmoe",
            {"input_ids": ids()},
            "data.npz holds the array 'input_ids', which the vmoe model does not take",
            VMOE_TAKES,
        ),
        (
            "vmoe",
            {"pixel_values": np.zeros((5, 1, 28, 28), np.float32)},
            "data.npz: pixel_values are float32[5, 1, 28, 28], expected float [N, 1, 12, 12]",
            "store them as the model takes them, or store uint8 `images`",
        ),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(name, arrays, what, hint):
    with pytest.raises(UserError) as caught:
        check_inputs(arrays, tiny(name), "data.npz")
    assert (caught.value.what, caught.value.hint) == (what, hint)
