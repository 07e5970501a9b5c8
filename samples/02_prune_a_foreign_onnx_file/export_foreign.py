"""What somebody else might hand you: two ONNX files made with torch.onnx, without moe-edge's exporter."""

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


class ReluRouted(torch.nn.Module):
    """One MoE layer, two of four experts a token, whose router scores experts with a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(16, 4)
        self.up_EHF = torch.nn.Parameter(torch.randn(4, 16, 32))
        self.down_EFH = torch.nn.Parameter(torch.randn(4, 32, 16))

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """(T, H) to (T, H)."""
        gates_TK, ids_TK = self.router(x_TH).relu().topk(2)
        middle = torch.nn.functional.gelu(x_TH[:, None, None] @ self.up_EHF[ids_TK])
        outputs_TKH = (middle @ self.down_EFH[ids_TK]).squeeze(2)
        return (outputs_TKH * gates_TK[..., None]).sum(1)


def export_layer(layer: torch.nn.Module, out: Path) -> None:
    """A layer by itself, for any number of tokens."""
    tokens = {0: torch.export.Dim.DYNAMIC}
    torch.onnx.export(layer, (torch.randn(5, 16),), out, dynamic_shapes=(tokens,), dynamo=True, verbose=False)


if __name__ == "__main__":
    export_transformer(Path("checkpoint"), Path("foreign"))
    export_layer(ReluRouted(), Path("relu_routed.onnx"))
