"""What somebody else might hand you: three ONNX files made with torch.onnx, without moe-edge's exporter."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from models import vmoe


def export_transformer(checkpoint: Path, out: Path) -> None:
    """A checkpoint with transformers' ``batched_mm`` experts, in the layout of model hubs."""
    vmoe.register()
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    model.set_experts_implementation("batched_mm")
    out.mkdir()
    torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 1, 28, 28),),
        out / "model.onnx",
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: "batch_size"}},
        dynamo=True,
        verbose=False,
    )
    model.config.save_pretrained(out)
    shutil.copy(checkpoint / "preprocessor_config.json", out)


class Layer(torch.nn.Module):
    """One MoE layer by hand, two of eight experts a token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(16, 8)
        self.up_EHF = torch.nn.Parameter(torch.randn(8, 16, 32))
        self.down_EFH = torch.nn.Parameter(torch.randn(8, 32, 16))

    def scores(self, x_TH: torch.Tensor) -> torch.Tensor:
        """(T, E)."""
        raise NotImplementedError

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """(T, H) to (T, H)."""
        gates_TK, ids_TK = self.scores(x_TH).topk(2)
        middle = torch.nn.functional.gelu(x_TH[:, None, None] @ self.up_EHF[ids_TK])
        outputs_TKH = (middle @ self.down_EFH[ids_TK]).squeeze(2)
        return (outputs_TKH * gates_TK[..., None]).sum(1)


class TaskMasked(Layer):
    """For one task: five experts are masked out by a logit of -inf, and still there."""

    def scores(self, x_TH: torch.Tensor) -> torch.Tensor:
        """(T, E)."""
        mask_E = torch.full((8,), -torch.inf)
        mask_E[[0, 3, 6]] = 0.0
        return (self.router(x_TH) + mask_E).softmax(-1)


class ReluRouted(Layer):
    """Its router scores experts with a ReLU."""

    def scores(self, x_TH: torch.Tensor) -> torch.Tensor:
        """(T, E)."""
        return self.router(x_TH).relu()


def export_layer(layer: torch.nn.Module, out: Path) -> None:
    """A layer by itself, for any number of tokens."""
    tokens = {0: torch.export.Dim.DYNAMIC}
    torch.onnx.export(layer, (torch.randn(5, 16),), out, dynamic_shapes=(tokens,), dynamo=True, verbose=False)


if __name__ == "__main__":
    export_transformer(Path("checkpoint"), Path("foreign"))
    export_layer(TaskMasked(), Path("task_masked.onnx"))
    export_layer(ReluRouted(), Path("relu_routed.onnx"))
