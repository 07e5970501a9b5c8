"""Train a checkpoint on task data, to recover what pruning cost, or to prune meanwhile.

--method plain: the task's loss. full-router: the same, while the experts that --plan drops give nothing; the new
checkpoint still has them, and its plan.json is for optimize. task-specific: drop the experts that the task uses less
and less, until one a layer is left. seer: make routers decisive, and lower K. router-kd: train only routers, to answer
as --teacher does, without labels.

--recipe says how: adamw, or the SGD of arXiv 2405.16646 for pruned vision models, router-norm-cifar or
router-norm-imagenet. Any value of a recipe can be given beside it.

Example: moe-edge finetune pruned/ --data train.npz --steps 300 -o recovered/
Example: moe-edge finetune pruned/ --data train.npz --recipe router-norm-cifar --batch-size 128 -o recovered-sgd/
Example: moe-edge finetune checkpoint/ --data train.npz --method task-specific --beta 0.5 -o one-expert/
Example: moe-edge finetune pruned/ --data train.npz --method router-kd --teacher checkpoint/ -o imitating/
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console
from cli.options import AsJson, Output, TrustRemoteCode
from cli.trust import warn_of_code


def finetune(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory, as transformers writes it.")],
    data: Annotated[
        Path, typer.Option(help=".npz of model inputs, or of uint8 `images`; with `labels` for a classifier.")
    ],
    output: Output,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="plain, full-router, task-specific, seer or router-kd.")
    ] = "plain",
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="adamw, router-norm-cifar or router-norm-imagenet.")
    ] = "adamw",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; by default 1000.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Once warmed up; by default the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of a step; by default the recipe's.")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps in which the learning rate rises; by default the recipe's.")
    ] = None,
    final_learning_rate: Annotated[
        float | None, typer.Option(help="At the last step; by default the recipe's.")
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Longer gradients are scaled down to it; by default the recipe's.")
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD; by default the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of shuffling and of the model's own noise.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="A plan of --router full.")] = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What an expert is found useful by, alpha (its share of the gates; default) or hit-rate.",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="When experts go, eager (default), staged or two-pass."),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(help="Parts of the first half of the steps, after each of which experts go; by default 5."),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Experts go whose score is below beta divided by the experts left; by default 0.5."),
    ] = None,
    floor: Annotated[int | None, typer.Option(help="Experts that a layer has in the end; by default 1.")] = None,
    entropy_weight: Annotated[
        float | None, typer.Option(help="Weight of the routers' entropy in the loss; by default 0.01.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="K in the end; by default as it is.")] = None,
    lower_at: Annotated[list[int] | None, typer.Option(help="A step after which K falls by one.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="The checkpoint before it was pruned.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the softmax over both models' logits; by default 1.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint directory."""
    from moe_spec.identity import checkpoint_sha256

    with console.progress("loading torch"):
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
