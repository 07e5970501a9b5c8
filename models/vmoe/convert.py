"""A published V-MoE as a checkpoint in our layout: ``python -m models.vmoe.convert PREFIX --top-k 2 -o DIR``.

PREFIX is what stands before ``.index`` in the name of a file of google-research/vmoe's checkpoints. What its tree does
not say is K. Its routers drop tokens that a full expert has no place for; here none is dropped.
"""

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from models.vmoe.configuration import VMoeConfig
from models.vmoe.modeling import VMoeForImageClassification
from models.vmoe.published import Array, read_arrays
from moe_spec.errors import UserError
from moe_spec.files import new_directory, refuse_existing

_BLOCK = re.compile(r"Encoder/encoderblock_(\d+)/")


def convert(prefix: Path, out: Path, top_k: int = 2) -> VMoeConfig:
    """Write the new directory ``out`` with config.json and safetensors of a VisionTransformerMoe.

    Raises:
        UserError: ``out`` exists, ``prefix`` cannot be read, its arrays are of another architecture, or K is not
            between 1 and E.
    """
    refuse_existing(out)
    arrays = parameters_of(read_arrays(prefix))
    try:
        config = config_of(arrays, top_k)
        model = VMoeForImageClassification(config)
        model.load_state_dict(state_of(arrays, config))
    except (KeyError, ValueError, RuntimeError, StrictDataclassError) as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        reason = str(cause).strip().splitlines()
        raise UserError(
            f"{prefix} is no VisionTransformerMoe that is known here: {type(cause).__name__}: {reason[-1].strip()}",
            hint="known: learned positions, classifier token or gap, NoisyTopExpertsPerItemRouter, no ensemble",
        ) from error
    with new_directory(out) as staging:
        model.save_pretrained(staging)
    return config


def parameters_of(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The model's own of everything that training kept, by their names in the model.

    >>> list(parameters_of({"params/head/bias": np.zeros(1), "opt_state/0/count": np.zeros(1)}))
    ['head/bias']
    """
    roots = ("params/", "target/", "optimizer/target/")
    root = next((root for root in roots if any(name.startswith(root) for name in arrays)), "")
    return {name.removeprefix(root): array for name, array in arrays.items() if name.startswith(root)}


def config_of(arrays: Mapping[str, Array], top_k: int) -> VMoeConfig:
    """Sizes of the model that these parameters are of.

    Raises:
        UserError: K is not between 1 and E.
        ValueError: there are no experts.
    """
    patch, _, channels, hidden = arrays["embedding/kernel"].shape
    blocks = sorted({int(found[1]) for name in arrays if (found := _BLOCK.match(name))})
    sparse = [block for block in blocks if f"Encoder/encoderblock_{block}/Moe/Router/dense/kernel" in arrays]
    if not sparse:
        raise ValueError("none of its blocks has a router")
    class_token = "cls" in arrays
    side = math.isqrt(arrays["Encoder/posembed_input/pos_embedding"].shape[1] - class_token)
    experts, _, width = arrays[f"Encoder/encoderblock_{sparse[0]}/Moe/Mlp/Dense_0/kernel"].shape
    if not 1 <= top_k <= experts:
        raise UserError(f"each token is to select {top_k} of {experts} experts", hint=f"--top-k from 1 to {experts}")
    config: Any = VMoeConfig
    made: VMoeConfig = config(
        image_size=side * patch,
        num_channels=channels,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=arrays["Encoder/encoderblock_0/SelfAttention/query/kernel"].shape[1],
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_layers=sparse,
        patch_size=patch,
        class_token=class_token,
        pre_logits="pre_logits/kernel" in arrays,
        hidden_act="gelu_pytorch_tanh",  # what flax calls gelu
        num_labels=len(arrays["head/bias"]),
    )
    return made


def state_of(arrays: Mapping[str, Array], config: VMoeConfig) -> dict[str, Tensor]:
    """The state dict of our model."""
    state = {
        "stem.convolutions.0.weight": arrays["embedding/kernel"].transpose(3, 2, 0, 1),
        "stem.convolutions.0.bias": arrays["embedding/bias"],
        "stem.position_embeddings": arrays["Encoder/posembed_input/pos_embedding"],
        **_norm("layernorm", arrays, "Encoder/encoder_norm"),
        **_dense("classifier", arrays, "head"),
    }
    if config.class_token:
        state["stem.class_token"] = arrays["cls"]
    if config.pre_logits:
        state |= _dense("pre_logits", arrays, "pre_logits")
    for block in range(config.num_hidden_layers):
        state |= _block(f"layers.{block}", arrays, f"Encoder/encoderblock_{block}", sparse=config.has_experts(block))
    return {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in state.items()}


def _block(name: str, arrays: Mapping[str, Array], path: str, *, sparse: bool) -> dict[str, Array]:
    state = {
        **_norm(f"{name}.layernorm_before", arrays, f"{path}/LayerNorm_0"),
        **_norm(f"{name}.layernorm_after", arrays, f"{path}/LayerNorm_1"),
        **_attention(f"{name}.attention", arrays, f"{path}/SelfAttention"),
    }
    if not sparse:
        up, down = (_dense(f"{name}.mlp.{ours}_proj", arrays, f"{path}/Mlp/{theirs}") for ours, theirs in _LAYERS)
        return state | up | down
    state[f"{name}.mlp.router.weight"] = arrays[f"{path}/Moe/Router/dense/kernel"].T
    for ours, theirs in _LAYERS:
        state[f"{name}.mlp.experts.{ours}_proj"] = arrays[f"{path}/Moe/Mlp/{theirs}/kernel"].transpose(0, 2, 1)
        state[f"{name}.mlp.experts.{ours}_proj_bias"] = arrays[f"{path}/Moe/Mlp/{theirs}/bias"]
    return state


_LAYERS = (("up", "Dense_0"), ("down", "Dense_1"))


def _attention(name: str, arrays: Mapping[str, Array], path: str) -> dict[str, Array]:
    """Heads (H, heads, D) side by side, queries before keys before values."""
    hidden = arrays[f"{path}/query/kernel"].shape[0]
    parts = [f"{path}/{part}" for part in ("query", "key", "value")]
    return {
        f"{name}.qkv_proj.weight": np.concatenate([arrays[f"{part}/kernel"].reshape(hidden, -1).T for part in parts]),
        f"{name}.qkv_proj.bias": np.concatenate([arrays[f"{part}/bias"].reshape(-1) for part in parts]),
        f"{name}.o_proj.weight": arrays[f"{path}/out/kernel"].reshape(-1, hidden).T,
        f"{name}.o_proj.bias": arrays[f"{path}/out/bias"],
    }


def _dense(name: str, arrays: Mapping[str, Array], path: str) -> dict[str, Array]:
    return {f"{name}.weight": arrays[f"{path}/kernel"].T, f"{name}.bias": arrays[f"{path}/bias"]}


def _norm(name: str, arrays: Mapping[str, Array], path: str) -> dict[str, Array]:
    return {f"{name}.weight": arrays[f"{path}/scale"], f"{name}.bias": arrays[f"{path}/bias"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 done, 1 the user can mend it."""
    parser = argparse.ArgumentParser(prog="python -m models.vmoe.convert", description="Convert a published V-MoE.")
    parser.add_argument("prefix", type=Path, help="what stands before .index")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write; it must not exist yet")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token selects")
    options = parser.parse_args(arguments)
    try:
        config: Any = convert(options.prefix, options.output, options.top_k)
    except UserError as failure:
        sys.stderr.write(f"error: {failure}\n")
        return 1
    sys.stdout.write(f"{options.output}: {config.num_experts} experts in blocks {config.moe_layers}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
