"""The exporters as their users call them, without their chatter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import torch
from torch import nn
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from tests.foreign.inputs import Inputs

OUTPUT = "y"


def dynamo(model: nn.Module, inputs: Inputs, path: Path, *, opset: int | None = None, optimize: bool = True) -> None:
    """torch.onnx.export as it is by default since torch 2.9."""
    with _quiet():
        program = torch.onnx.export(
            model,
            kwargs=inputs.random(),
            dynamo=True,
            dynamic_shapes={name: dict(axes) for name, axes in inputs.axes.items()},
            output_names=[OUTPUT],
            opset_version=opset,
            optimize=optimize,
            verbose=False,
        )
    assert program is not None
    program.save(path)


def torchscript(
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    *,
    opset: int = 17,
    functions: bool | Collection[type[nn.Module]] = False,
) -> None:
    """torch.onnx.export as it was before, and as most tutorials still show it."""
    example = inputs.random()
    with _quiet():
        torch.onnx.export(
            model,
            tuple(example.values()),
            path,
            dynamo=False,
            input_names=list(example),
            output_names=[OUTPUT],
            dynamic_axes={name: dict(axes) for name, axes in inputs.axes.items()},
            opset_version=opset,
            export_modules_as_functions=functions,
        )


def transformers(model: nn.Module, inputs: Inputs, path: Path, *, ort_fusions: Literal["cuda"] | None = None) -> None:
    """transformers' own exporter; with ``ort_fusions="cuda"`` it writes ONNX Runtime's fused ops."""
    dynamic = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in inputs.axes.items()}
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic, ort_fusions=ort_fusions)
    exporter: Any = OnnxExporter()  # its annotations want a whole model, it takes a block as well
    with _quiet():
        program = exporter.export(model, inputs.random(), config=config).program
    onnx_ir.save(program, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print, log and warn.

    They warn about their own age and internals and, always, that ``index_add`` and masks may go wrong; the tests
    compare what the graph computes instead.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
