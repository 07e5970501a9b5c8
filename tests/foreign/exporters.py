"""The exporters as their users call them, without their chatter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir
import torch
from torch import nn
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from exporter.upstream import registered_quickly
from tests.foreign.inputs import Inputs

OUTPUT = "y"

Export = Callable[[nn.Module, Inputs, Path], None]
"""Writes a graph of a model, traced with the example that its inputs give."""


def dynamo(model: nn.Module, inputs: Inputs, path: Path, *, opset: int | None = None, optimize: bool = True) -> None:
    """torch.onnx.export as it is by default since torch 2.9."""
    with _quiet():
        program = torch.onnx.export(
            model,
            kwargs=inputs.to_trace(),
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
    example = inputs.to_trace()
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


def external(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """``torchscript``, every initialiser in a file of its own beside the graph, however small."""
    torchscript(model, inputs, path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)


def transformers(model: nn.Module, inputs: Inputs, path: Path, *, ort_fusions: Literal["cuda"] | None = None) -> None:
    """transformers' own exporter; with ``ort_fusions="cuda"`` it writes ONNX Runtime's fused ops."""
    dynamic = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in inputs.axes.items()}
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic, ort_fusions=ort_fusions)
    exporter: Any = OnnxExporter()  # its annotations want a whole model, it takes a block as well
    with _quiet():
        program = exporter.export(model, inputs.to_trace(), config=config).program
    onnx_ir.save(program, path)


unoptimized: Export = partial(dynamo, optimize=False)
opset_18: Export = partial(dynamo, opset=18)
opset_23: Export = partial(dynamo, opset=23)
fused: Export = partial(transformers, ort_fusions="cuda")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print, log, warn and parse for nothing.

    They warn about their own age and internals and, always, that ``index_add`` and masks may go wrong; the tests
    compare what the graph computes instead.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with registered_quickly(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
