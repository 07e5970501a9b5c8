"""Prune: a plan turns a checkpoint into a smaller one, from file to file."""

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.checkpoints import load_model, load_skeleton, save_model, stored_tensors
from models.families import family_of
from models.moe_layers import find_moe_layers
from models.own_code import copy_code
from models.stored_merges import StoredMerges, fill_routers
from models.stored_names import is_cut, parameter_names
from models.stored_parameters import StoredParameters
from models.tensor_files import SHARD_BYTES, write_tensors
from moe_spec.companions import copy_companions
from moe_spec.errors import UserError
from moe_spec.files import new_directory, refuse_existing
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import NEW
from moe_spec.plan import PLAN, PruningPlan
from moe_spec.progress import Progress, silent
from pruning.apply import MERGE_WAY, ONNX_WAY, apply_plan, distinct_shapes
from pruning.merging.stored import are_saved_as_stored, merged_tensors
from pruning.stream import lie_by_layer, pruned_parameters, without_dropped


def prune(
    checkpoint: Path,
    plan_path: Path,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
    *,
    trust_remote_code: bool = False,
    on_progress: Progress = silent,
) -> Path:
    """Write a checkpoint without the experts that a plan drops; ``AutoModel.from_pretrained`` loads it.

    Weights keep their dtype. The plan stands in the new directory as plan.json. It is carried out from file to file, so
    memory does not grow with the model. The model is in memory for experts of several layers that the files have as one
    list (ERNIE 4.5 VL), and to merge experts that transformers would not save as they are stored, such as stacked ones
    where it saves one tensor an expert.

    Args:
        checkpoint: config.json and safetensors weights.
        plan_path: plan.json for it.
        out: a directory that does not exist.
        shard_bytes: of the weights in one file.
        trust_remote_code: run the Python files that config.json names (`models.own_code`).
        on_progress: told of the bytes that are hashed and written.

    Raises:
        UserError: ``out`` exists; checkpoint or plan cannot be read; the plan is for another model, or keeps what a
            torch router or the one count in config.json cannot say, such as a full router.
    """
    refuse_existing(out)
    plan = PruningPlan.load(plan_path)
    plan.require_model(checkpoint_sha256(checkpoint, on_progress), str(checkpoint))
    plan.require_narrow_routers("a checkpoint")
    plan.require_no_aliases()
    skeleton, tensors = load_skeleton(checkpoint, trust_remote_code=trust_remote_code), stored_tensors(checkpoint)
    names = parameter_names(skeleton, tensors, checkpoint)
    pruned = pruned_parameters(skeleton, plan)
    merges = None
    if plan.merges and not is_cut(skeleton):
        stored = StoredParameters(checkpoint, torch.float32, trust_remote_code=trust_remote_code)
        fill_routers(skeleton, stored)
        merges = StoredMerges(skeleton, stored, plan)
    apply_plan(skeleton, plan)  # refusals come before a weight of an expert is read
    require_config_counts(skeleton, plan, checkpoint)
    in_memory = not lie_by_layer(pruned, names) or (plan.merges and merges is None)
    in_memory |= merges is not None and not are_saved_as_stored(skeleton, merges, tensors, names)
    in_runs = family_of(skeleton.config).in_runs
    kept = {} if in_memory else without_dropped(tensors, names, pruned, checkpoint, in_runs=in_runs)
    with new_directory(out) as staging, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        if in_memory:
            on_progress("pruning in memory")
            model = load_model(checkpoint, dtype=None, trust_remote_code=trust_remote_code)
            apply_plan(model, plan)
            save_model(model, staging)
        else:
            if merges is not None:
                on_progress("merging experts")
                kept |= merged_tensors(skeleton, merges, tensors, names, Path(scratch))
            skeleton.config.save_pretrained(staging)
            write_tensors(kept, staging, shard_bytes, on_progress)
        copy_companions(checkpoint, staging)
        copy_code(checkpoint, staging)
        plan.save(staging / PLAN)
    return out


def unloaded_experts(checkpoint: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Stored tensors of experts that no plan reaches, because transformers loads no layer for them.

    DeepSeek-V3's are those of the layers that predict further tokens. ``prune`` copies them as they are, all E experts.

    Raises:
        UserError: no checkpoint of a known family, or files that are not complete.
    """
    tensors = stored_tensors(checkpoint)
    loaded = parameter_names(load_skeleton(checkpoint, trust_remote_code=trust_remote_code), tensors, checkpoint)
    return sorted(name for name in tensors if ".experts." in name and name not in loaded)


def require_config_counts(pruned: PreTrainedModel, plan: PruningPlan, checkpoint: Path) -> None:
    """Refuse counts that no config.json can say, of a model that ``plan`` was applied to.

    Raises:
        UserError: layers have different ones, or other ones than experts of the attention, which share them.
    """
    row = family_of(pruned.config)
    fewer = any(layer.dropped for layer in plan.layers)
    top_k = getattr(row.counts(pruned.config), row.top_k_key, None)  # where the attention has experts it is as it was
    if row.attention_experts and (fewer or any(layer.top_k != top_k for layer in plan.layers)):
        raise UserError(
            f"the attention of {row.model_type} {'has' if fewer else 'selects'} as many experts as its MLPs, and the "
            f"config.json of {checkpoint} one count for both",
            hint="plan for the MLPs, and export with the plan: moe-edge export CHECKPOINT --plan plan.json",
        )
    if len(distinct_shapes(pruned)) > 1:
        counts = ", ".join(f"{layer.name}: {layer.num_experts} (K={layer.top_k})" for layer in find_moe_layers(pruned))
        raise UserError(
            f"the plan leaves different counts in the layers of {checkpoint} ({counts}), "
            "but a checkpoint's config.json has one for all of them",
            hint=MERGE_WAY if any(layer.router == NEW for layer in plan.layers) else ONNX_WAY,
        )
