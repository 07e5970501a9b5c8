"""google-research/vmoe's checkpoints: files that this test writes in their layout, and in numpy what flax computes.

No published file is read here: they cannot be had offline.
"""

import math
import re

import msgpack
import numpy as np
import pytest
import torch

from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from models.vmoe.convert import convert, main
from models.vmoe.published import VERSION, read_arrays
from moe_spec.errors import UserError

B, S, PATCH, H, F, HEADS, E, K, CLASSES = 2, 8, 4, 8, 12, 2, 4, 2, 5
SPARSE = (1, 2)


def tree(rng, *, token=True):
    """Parameters of a VisionTransformerMoe of three blocks by their names in flax."""

    def dense(*shape, bias=None):
        bias = shape[-1:] if bias is None else bias
        return {"kernel": array(*shape), "bias": array(*bias)}

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32) / math.sqrt(H)

    def norm():
        return {"scale": 1 + array(H), "bias": array(H)}

    def block(number):
        heads = {part: dense(H, HEADS, H // HEADS, bias=(HEADS, H // HEADS)) for part in ("query", "key", "value")}
        made = {"LayerNorm_0": norm(), "LayerNorm_1": norm(), "SelfAttention": heads}
        heads["out"] = dense(HEADS, H // HEADS, H)
        if number in SPARSE:
            mlp = {"Dense_0": dense(E, H, F, bias=(E, F)), "Dense_1": dense(E, F, H, bias=(E, H))}
            return made | {"Moe": {"Mlp": mlp, "Router": {"dense": {"kernel": 3 * array(H, E)}}}}
        return made | {"Mlp": {"Dense_0": dense(H, F), "Dense_1": dense(F, H)}}

    positions = (S // PATCH) ** 2 + token
    encoder = {f"encoderblock_{number}": block(number) for number in range(3)}
    encoder |= {"encoder_norm": norm(), "posembed_input": {"pos_embedding": array(1, positions, H)}}
    made = {"embedding": dense(PATCH, PATCH, 3, H), "Encoder": encoder, "head": dense(H, CLASSES)}
    return made | ({"cls": array(1, 1, H), "pre_logits": dense(H, H)} if token else {})


def pack(value):
    return msgpack.packb(value, use_bin_type=True)


def packed_slices(place):
    return pack(tuple(pack((axis.start, axis.stop, axis.step)) for axis in place))


def packed_array(array):
    return msgpack.ExtType(1, pack((array.shape, array.dtype.name, array.tobytes())))


def pieces_of(array):
    """An array in halves along its first axis, where it has one."""
    if array.ndim == 0:
        return [(array, ())]
    half = len(array) // 2
    cuts = [(0, half), (half, len(array))] if half else [(0, len(array))]
    return [(array[a:b], (slice(a, b), *(slice(0, length) for length in array.shape[1:]))) for a, b in cuts]


def write(prefix, names, version=VERSION, shards=2):
    """As ``vmoe.checkpoints.partitioned`` writes it, in two shards; large pieces in sub-pieces."""
    chunks = [{"__msgpack_array_chunk_a87ca2__": True} for _ in range(shards)]
    count = iter(range(10_000))

    def leaf(array):
        number, pieces = next(count), pieces_of(array)
        for piece, place in pieces:
            flat = piece.reshape(-1)
            parts = [packed_array(part) for part in np.array_split(flat, min(2, flat.size))]
            entry = [parts, msgpack.ExtType(6, packed_slices(place))]
            chunks[number % shards].setdefault(str(number), []).append(entry)
        described = pack((array.shape, array.dtype.name, False, {}))
        places = tuple(packed_slices(place) for _, place in pieces)
        return msgpack.ExtType(8, pack((described, places, (number % shards,) * len(pieces))))

    def indexed(node):
        return {key: indexed(node[key]) for key in sorted(node)} if isinstance(node, dict) else leaf(node)

    index = {"shard_count": shards, "index": indexed(names), "version": version}
    prefix.with_name(f"{prefix.name}.index").write_bytes(pack(index))
    for shard, content in enumerate(chunks):
        prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}").write_bytes(pack(content))
    return prefix


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def forward(names, images):
    """Logits of images (B, S, S, 3), in float64."""

    def linear(x, one):
        return x @ one["kernel"].astype(np.float64) + one["bias"]

    def norm(x, one):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * one["scale"] + one["bias"]

    def mlp(x, first, second):
        x = linear(x, first)
        return linear(x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), second)

    def attention(x, one):
        query, key, value = (
            np.einsum("bph,hnd->bnpd", x, one[part]["kernel"]) + one[part]["bias"][:, None]
            for part in ("query", "key", "value")
        )
        mixed = softmax(query @ key.swapaxes(-1, -2) / math.sqrt(H // HEADS)) @ value
        return np.einsum("bnpd,ndh->bph", mixed, one["out"]["kernel"]) + one["out"]["bias"]

    def moe(x, one):
        gates = softmax(x @ one["Router"]["dense"]["kernel"])
        out = np.zeros_like(x)
        for place in np.ndindex(x.shape[:2]):
            for expert in np.argsort(gates[place])[-K:]:
                layers = [{key: part[expert] for key, part in one["Mlp"][name].items()} for name in sorted(one["Mlp"])]
                out[place] += gates[place][expert] * mlp(x[place], *layers)
        return out

    side = S // PATCH
    patches = images.reshape(len(images), side, PATCH, side, PATCH, 3).swapaxes(2, 3).reshape(len(images), side**2, -1)
    x = patches @ names["embedding"]["kernel"].reshape(-1, H).astype(np.float64) + names["embedding"]["bias"]
    if "cls" in names:
        x = np.concatenate([np.tile(names["cls"], (len(x), 1, 1)), x], axis=1)
    encoder = names["Encoder"]
    x = x + encoder["posembed_input"]["pos_embedding"]
    for number in range(3):
        one = encoder[f"encoderblock_{number}"]
        x = x + attention(norm(x, one["LayerNorm_0"]), one["SelfAttention"])
        y = norm(x, one["LayerNorm_1"])
        x = x + (moe(y, one["Moe"]) if "Moe" in one else mlp(y, one["Mlp"]["Dense_0"], one["Mlp"]["Dense_1"]))
    x = norm(x, encoder["encoder_norm"])
    x = np.tanh(linear(x[:, 0], names["pre_logits"])) if "cls" in names else x.mean(axis=1)
    return linear(x, names["head"])


@pytest.mark.parametrize("token", [True, False])
def test_a_converted_model_computes_what_flax_computes(token, tmp_path):
    rng = np.random.default_rng(0)
    names = tree(rng, token=token)
    write(tmp_path / "vmoe_1", {"params": names, "step": np.zeros((), np.int32)})
    assert main([str(tmp_path / "vmoe_1"), "-o", str(tmp_path / "out")]) == 0
    model = load_model(tmp_path / "out")
    images = rng.standard_normal((B, S, S, 3))
    with torch.no_grad():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2)).float()).logits
    np.testing.assert_allclose(logits, forward(names, images), rtol=1e-4, atol=1e-5)
    layers = find_moe_layers(model)
    assert [layer.name for layer in layers] == ["layers.1.mlp", "layers.2.mlp"]
    assert {(layer.num_experts, layer.top_k) for layer in layers} == {(E, K)}


def test_arrays_come_back_whatever_their_shards(tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    names = {"a": {"10": matrix, "2": np.full(1, 7, np.float32)}, "b": np.full((), 4, np.int32)}
    write(tmp_path / "some", names, shards=3)
    arrays = read_arrays(tmp_path / "some")
    assert list(arrays) == ["a/10", "a/2", "b"]
    np.testing.assert_array_equal(arrays["a/10"], matrix)
    assert arrays["b"] == 4


SMALL = {"a": np.arange(6, dtype=np.float32).reshape(3, 2)}


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def bare(path):
    path.write_bytes(pack({"__msgpack_array_chunk_a87ca2__": True, "0": [], "padding": bytes(100)}))


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        (".index", cut, "some.index is no file of a google-research/vmoe checkpoint: "),
        (".index", lambda path: path.unlink(), "some.index does not exist"),
        (".index", lambda path: path.write_bytes(b"\x80\x04K\x00."), "some.index is no file of a google-research"),
        (".data-00000-of-00002", cut, "some.data-00000-of-00002 is no file of a google-research/vmoe checkpoint: "),
        (".data-00001-of-00002", lambda path: path.unlink(), "some.data-00001-of-00002 is missing, its index names it"),
        (".data-00000-of-00002", bare, "some.data-00000-of-00002 is no file of a google-research/vmoe checkpoint: "),
        (".data-00000-of-00002", lambda path: path.write_bytes(b""), "some.data-00000-of-00002 is no file of a google"),
    ],
)
def test_damaged_files_are_refused(file, damage, reason, tmp_path):
    damage((write(tmp_path / "some", SMALL)).with_name(f"some{file}"))
    with pytest.raises(UserError, match=re.escape(reason)):
        read_arrays(tmp_path / "some")


def test_an_index_that_lies_is_refused_before_anything_is_allocated(tmp_path):
    write(tmp_path / "some", SMALL)
    described = pack(((2**40, 2**20), "float32", False, {}))
    leaf = msgpack.ExtType(8, pack((described, (), ())))
    (tmp_path / "some.index").write_bytes(pack({"shard_count": 2, "index": {"a": leaf}, "version": VERSION}))
    with pytest.raises(UserError, match=r"bytes for arrays of 4,611,686,018,427,387,904"):
        read_arrays(tmp_path / "some")


def test_pieces_upon_another_are_refused(tmp_path):
    write(tmp_path / "some", SMALL)
    content = msgpack.unpackb((tmp_path / "some.data-00000-of-00002").read_bytes())
    content["0"][1] = [content["0"][0][0], content["0"][0][1]]
    (tmp_path / "some.data-00000-of-00002").write_bytes(pack(content) + b"")
    with pytest.raises(UserError, match=re.escape("the pieces of a do not make up an array of [3, 2]")):
        read_arrays(tmp_path / "some")


def test_another_version_and_another_architecture_are_refused(tmp_path):
    write(tmp_path / "old", SMALL, version=None)
    with pytest.raises(UserError, match=r"old\.index is of version None, only '20220622' can be read without"):
        read_arrays(tmp_path / "old")
    write(tmp_path / "other", SMALL)
    with pytest.raises(UserError, match=r"other is no VisionTransformerMoe that is known here: KeyError: 'embedding"):
        convert(tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("drop", "top_k", "said"),
    [
        ((), 0, "each token is to select 0 of 4 experts\nhint: --top-k from 1 to 4\n"),
        ((), 9, "each token is to select 9 of 4 experts\nhint: --top-k from 1 to 4\n"),
        (
            SPARSE,
            2,
            "{prefix} is no VisionTransformerMoe that is known here: ValueError: none of its blocks has a router\n"
            "hint: known: learned positions, classifier token or gap, NoisyTopExpertsPerItemRouter, no ensemble\n",
        ),
    ],
)
def test_a_dense_model_and_a_k_of_no_router_are_refused(drop, top_k, said, tmp_path, capsys):
    names, prefix = tree(np.random.default_rng(0)), tmp_path / "vit"
    for number in drop:
        del names["Encoder"][f"encoderblock_{number}"]["Moe"]
    write(prefix, {"params": names})
    assert main([str(prefix), "--top-k", str(top_k), "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {said.format(prefix=prefix)}"
