"""Train a checkpoint on task data: recover what pruning cost, or prune while the task is learned.

--method plain: the task's loss. full-router: the same, while experts that --plan drops behind full routers give
nothing; the new checkpoint has them still, and the new plan.json removes them from its graph. task-specific: drop the
experts that the task uses less and less, until one a layer is left. seer: make routers decisive, and lower K.
router-kd: only the routers learn, from --teacher, without labels.

--recipe adamw, or how a V-MoE is fine-tuned after pruning in arXiv 2405.16646, with SGD: router-norm-cifar or
router-norm-imagenet. Whatever a recipe says can be given here; the warm-up is a share of the steps.

Example: moe-edge finetune pruned/ --data train.npz --steps 300 -o recovered/
Example: moe-edge finetune pruned/ --data train.npz --recipe router-norm-cifar --batch-size 128 -o recovered/
Example: moe-edge finetune checkpoint/ --data train.npz --method full-router --plan full.json -o recovered/
Example: moe-edge finetune checkpoint/ --data train.npz --method task-specific --beta 0.5 -o one-expert/
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console
from cli.options import AsJson, Output, TrustRemoteCode
from cli.trust import warn_of_code


def finetune(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory in transformers' layout.")],
    data: Annotated[Path, typer.Option(help=".npz of model inputs, or of uint8 `images`; with `labels`.")],
    output: Output,
    method: Annotated[str, typer.Option(help="plain, full-router, task-specific, seer or router-kd.")] = "plain",
    recipe: Annotated[str, typer.Option(help="adamw, router-norm-cifar or router-norm-imagenet.")] = "adamw",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; 1000 if not given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="After the warm-up; the recipe's if not given.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step; the recipe's if not given.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps; the recipe's if not given.")] = None,
    final_learning_rate: Annotated[float | None, typer.Option(help="At the last step; the recipe's.")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Longer gradients are scaled to it; the recipe's.")
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD; the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of shuffling and of the model's own noise.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="full-router: what gives nothing.")] = None,
    score: Annotated[str | None, typer.Option(help="task-specific: alpha (default) or hit-rate.")] = None,
    variant: Annotated[str | None, typer.Option(help="task-specific: eager (default), staged or two-pass.")] = None,
    windows: Annotated[int | None, typer.Option(help="task-specific: parts of the first half, 5.")] = None,
    beta: Annotated[float | None, typer.Option(help="task-specific: go below beta / experts alive, 0.5.")] = None,
    floor: Annotated[int | None, typer.Option(help="task-specific: experts left in the end, 1.")] = None,
    entropy_weight: Annotated[float | None, typer.Option(help="seer: of the routers' entropy, 0.01.")] = None,
    top_k: Annotated[int | None, typer.Option(help="seer: K in the end; as it is if not given.")] = None,
    lower_at: Annotated[list[int] | None, typer.Option(help="seer: a step after which K falls by one.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="router-kd: the checkpoint before it was pruned.")] = None,
    temperature: Annotated[float | None, typer.Option(help="router-kd: of the softmax over logits, 1.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint directory."""
    from moe_spec.identity import checkpoint_sha256
    from pruning.finetuning.finetune import finetune as run
    from pruning.finetuning.options import method as named_method
    from pruning.finetuning.recipe import recipe as named_recipe

    options = _given(
        plan=plan,
        score=score,
        variant=variant,
        windows=windows,
        beta=beta,
        floor=floor,
        entropy_weight=entropy_weight,
        top_k=top_k,
        lower_at=tuple(lower_at) if lower_at else None,
        teacher=teacher,
        temperature=temperature,
    )
    changes = _given(
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        warmup=warmup,
        final_learning_rate=final_learning_rate,
        max_grad_norm=max_grad_norm,
        momentum=momentum,
    )
    warn_of_code(checkpoint, teacher, trusted=trust_remote_code)
    with console.progress(f"loading {checkpoint}") as tell:
        done = run(
            checkpoint,
            data,
            named_method(method, options),
            dataclasses.replace(named_recipe(recipe), seed=seed, **changes),
            output,
            trust_remote_code=trust_remote_code,
            on_progress=tell,
        )
    first, last = done.first_and_last_loss()
    console.result(
        f"{output}: {len(done.losses)} steps of {method}, loss {first:.4f} in the first tenth, {last:.4f} in the last",
        {"output": str(output), "model_sha256": checkpoint_sha256(output), "finetuning": done.to_json()},
        as_json,
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
