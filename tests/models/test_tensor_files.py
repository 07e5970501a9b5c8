import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.tensor_files import INDEX, Span, StoredTensor, read_tensors, write_tensors
from moe_spec.errors import UserError

TENSORS = {
    "w": torch.arange(24, dtype=torch.float32).reshape(4, 3, 2),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "ids": torch.tensor([[1], [-2]]),
    "scalar": torch.tensor(0.5, dtype=torch.float16),
    "empty": torch.zeros(0, 7),
    "mask": torch.tensor([True, False, True]),
    "ünï": torch.ones(1),
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def assert_equal(loaded, expected):
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_what_is_copied_whole_is_the_file_that_safetensors_writes(source, tmp_path):
    save_file({name: tensor for name, tensor in TENSORS.items() if tensor.numel()}, source, metadata={"format": "pt"})
    write_tensors(read_tensors(source), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == source.read_bytes()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert not (tmp_path / INDEX).exists()


def test_shapes_sizes_and_dtypes_are_read_from_the_header_alone(source):
    tensors = read_tensors(source)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in TENSORS.items()}
    assert {name: tensor.size for name, tensor in tensors.items()} == {n: t.numel() for n, t in TENSORS.items()}
    assert {name: tensor.nbytes for name, tensor in tensors.items()} == {n: t.nbytes for n, t in TENSORS.items()}
    assert (tensors["half"].dtype, tensors["ids"].dtype) == ("BF16", "I64")


@settings(max_examples=30)
@given(name=st.sampled_from(["w", "half", "ids", "mask"]), draw=st.data())
def test_any_rows_of_any_tensor_are_those_of_torch(name, draw, tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    save_file(TENSORS, directory / "source.safetensors")
    stored = read_tensors(directory / "source.safetensors")
    keep = draw.draw(st.lists(st.integers(0, len(TENSORS[name]) - 1), max_size=6))
    write_tensors({name: stored[name].rows(keep)}, directory)
    assert_equal(load_file(directory / "model.safetensors"), {name: TENSORS[name][keep]})


@pytest.mark.parametrize("shard_bytes", [1, 40, 100, 120])
def test_shards_are_bounded_and_the_index_names_every_tensor_and_the_sum(source, tmp_path, shard_bytes):
    out = tmp_path / "out"
    out.mkdir()
    stored = read_tensors(source)
    write_tensors(stored, out, shard_bytes)
    index = json.loads((out / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert {path.name for path in out.iterdir()} == {*files, INDEX}
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    shards = {name: load_file(out / name) for name in files}
    for loaded in shards.values():
        assert len(loaded) == 1 or sum(tensor.nbytes for tensor in loaded.values()) <= shard_bytes
    assert {name: file for file, loaded in shards.items() for name in loaded} == index["weight_map"]
    assert_equal({name: tensor for loaded in shards.values() for name, tensor in loaded.items()}, TENSORS)


def test_a_tensor_may_be_put_together_from_pieces_of_several_files(source, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    (whole,) = read_tensors(source)["w"].spans
    parts = (Span(other, 4, 8), Span(whole.path, whole.start, 4), Span(other, 0, 4))
    write_tensors({"mixed": StoredTensor("F32", (2, 2), parts)}, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["mixed"].tolist() == [[2, 3], [0, 1]]


def test_pieces_larger_than_what_is_read_at_once_are_copied_whole(tmp_path):
    source = {"large": torch.randn(700, 1000, generator=torch.Generator().manual_seed(1))}
    save_file(source, tmp_path / "source.safetensors")
    write_tensors({"large": read_tensors(tmp_path / "source.safetensors")["large"].rows([699, 3])}, tmp_path)
    assert_equal(load_file(tmp_path / "model.safetensors"), {"large": source["large"][[699, 3]]})


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    return str(caught.value)


def test_what_is_no_complete_file_is_refused(source, tmp_path):
    hint = "\nhint: get the checkpoint again, complete"
    whole = source.read_bytes()
    for length in (0, 7, 8, 100, len(whole) - 1):
        source.write_bytes(whole[:length])
        assert refusal(source).startswith(f"{source} is no complete safetensors file: ")
        assert refusal(source).endswith(hint)
    assert refusal(tmp_path / "none").startswith(f"{tmp_path / 'none'} is no complete safetensors file: ")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [2, 2**62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "X32", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
    ],
)
def test_a_header_that_lies_is_refused_before_a_byte_is_copied(entry, tmp_path):
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "lies.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    assert refusal(path).startswith(f"{path} is no complete safetensors file: ")


def test_a_file_that_is_cut_while_it_is_read_is_an_error(source, tmp_path):
    stored = read_tensors(source)
    source.write_bytes(source.read_bytes()[:-4])
    with pytest.raises(UserError) as caught:
        write_tensors(stored, tmp_path)
    assert str(caught.value) == f"{source} was cut while it was read\nhint: get the checkpoint again, complete"
