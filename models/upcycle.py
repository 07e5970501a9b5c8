"""Dense decoders become one Mixtral, each layer's feed-forward networks its experts.

From copies of one decoder that is sparse upcycling, https://arxiv.org/abs/2212.05055; from branches of it that were
trained on a domain each, Branch-Train-MiX, https://arxiv.org/abs/2403.07816. Mixtral's norms, attention and
feed-forward layers are those of Llama and Mistral, and its gates sum to 1: experts that are all alike give what the
dense decoder gave, whatever the routers say.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers import initialization as init

from models.checkpoints import load_model, save_model
from models.families import DENSE
from moe_spec.companions import copy_companions
from moe_spec.errors import UserError
from moe_spec.files import new_directory, refuse_existing
from moe_spec.progress import Progress, counted, silent

_COMPUTED = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)
"""What configs say that shapes of weights do not: other values make another model of the same weights."""


def upcycle(checkpoints: Sequence[Path], top_k: int, out: Path, seed: int = 0, on_progress: Progress = silent) -> Path:
    """Write a Mixtral whose expert ``e`` is the feed-forward network of ``checkpoints[e]``, in every layer.

    Dtype, tokenizer and generation settings are those of the first checkpoint.

    Args:
        checkpoints: dense decoders of one shape, E of them; one may be named several times.
        top_k: K.
        out: a directory that does not exist.
        seed: of the routers, which are to be trained.
        on_progress: told of every checkpoint that is loaded, and of every weight that is mixed.

    Raises:
        UserError: ``out`` exists, a checkpoint cannot be read, and what `mix` refuses.
    """
    refuse_existing(out)
    paths = dict.fromkeys(checkpoints)
    each = counted(paths, "loading checkpoints", len(paths), on_progress)
    loaded = {path: load_model(path, dtype=None, known=require_dense) for path in each}
    torch.manual_seed(seed)
    model = mix([loaded[path] for path in checkpoints], top_k, on_progress)
    on_progress(f"writing {out}")
    with new_directory(out) as staging:
        save_model(model, staging)
        copy_companions(checkpoints[0], staging)
    return out


def mix(branches: Sequence[PreTrainedModel], top_k: int, on_progress: Progress = silent) -> MixtralForCausalLM:
    """A Mixtral of dense decoders, in eval mode; its routers are drawn from torch's global generator.

    What is no expert is the mean over the branches, so that it stays exactly what it is where they all agree.

    Args:
        branches: E causal language models of one shape; one may be there several times. The dtype is the first one's.
        top_k: K.
        on_progress: told of every weight.

    Raises:
        UserError: K is not between 1 and E, a branch has biases or is no dense decoder, or shapes or what is computed
            differ.
    """
    if not 1 <= top_k <= len(branches):
        raise UserError(
            f"each token is to select {top_k} of {len(branches)} experts",
            hint=f"--top-k from 1 to {len(branches)}, or more checkpoints",
        )
    weights = [_weights(branch) for branch in branches]
    for index, other in enumerate(weights):
        _require_same_shapes(weights[0], other, index)
        _require_same_computation(branches[0].config, branches[index].config, index)
    config = _config(branches[0].config, len(branches), top_k)
    with init.no_init_weights():
        model: MixtralForCausalLM = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=branches[0].dtype
        )
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in counted(state.items(), "mixing weights", len(state), on_progress):
            _fill(tensor, name, weights, config.initializer_range)
    model.train(False)
    return model


def require_dense(model_type: str) -> None:
    """Refuse what Mixtral's layers cannot hold.

    Raises:
        UserError: another architecture than those of `DENSE`.
    """
    if model_type not in DENSE:
        raise UserError(
            f"the {model_type} model cannot become a Mixtral, whose layers are others",
            hint=f"give a dense decoder of model_type {' or '.join(DENSE)}",
        )


def _weights(branch: PreTrainedModel) -> Mapping[str, Tensor]:
    """By name; none is a bias, and there is a head."""
    require_dense(branch.config.model_type)
    weights: dict[str, Tensor] = branch.state_dict()
    biases = [name for name in weights if name.endswith(".bias")]
    if biases or "lm_head.weight" not in weights:
        raise UserError(
            f"a Mixtral has no place for {biases[0]}" if biases else "the dense model has no lm_head: it says no token",
            hint="give a causal language model without biases",
        )
    return weights


def _require_same_shapes(first: Mapping[str, Tensor], other: Mapping[str, Tensor], index: int) -> None:
    for name in sorted(first.keys() | other.keys()):
        shapes = [list(weights[name].shape) if name in weights else None for weights in (first, other)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{name} is {shapes[0]} in checkpoint 0 and {shapes[1]} in checkpoint {index}",
                hint="give checkpoints of one shape: branches of the same model",
            )


def _require_same_computation(first: Any, other: Any, index: int) -> None:
    for name in _COMPUTED:
        values = [getattr(config, name, None) for config in (first, other)]  # a Llama has no sliding window
        if values[0] != values[1]:
            raise UserError(
                f"{name} is {values[0]!r} in checkpoint 0 and {values[1]!r} in checkpoint {index}",
                hint="give branches of the same model, or the same config.json to all",
            )


def _config(dense: Any, experts: int, top_k: int) -> MixtralConfig:
    """Whatever both have a word for is as in the dense one."""
    shared = {name: value for name, value in dense.to_dict().items() if name in MixtralConfig.__dataclass_fields__}
    own = {"model_type": MixtralConfig.model_type, "architectures": [MixtralForCausalLM.__name__]}
    return MixtralConfig(**shared | own, num_local_experts=experts, num_experts_per_tok=top_k)


def _fill(tensor: Tensor, name: str, branches: Sequence[Mapping[str, Tensor]], deviation: float) -> None:
    """Give the parameter called ``name`` its values."""
    block, _, part = name.partition(".mlp.")
    if part == "gate.weight":
        tensor.normal_(std=deviation)
    elif part == "experts.gate_up_proj":
        for expert_2FH, weights in zip(tensor, branches, strict=True):
            expert_2FH.copy_(torch.cat([weights[f"{block}.mlp.{half}_proj.weight"] for half in ("gate", "up")]))
    elif part == "experts.down_proj":
        for expert_HF, weights in zip(tensor, branches, strict=True):
            expert_HF.copy_(weights[f"{block}.mlp.down_proj.weight"])
    else:
        first = branches[0][name]
        tensor.copy_(first + torch.stack([weights[name] - first for weights in branches]).mean(dim=0))
