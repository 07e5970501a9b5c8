"""MoE blocks as small ONNX models, in every form, and what they compute in numpy, sharing no code with graph_passes."""

from tests.graph_passes.block_models.kinds import FORM_NAMES, ROUTERS, spec_of
from tests.graph_passes.block_models.limits import why_not, why_not_run
from tests.graph_passes.block_models.model import build, save
from tests.graph_passes.block_models.reference import compute
from tests.graph_passes.block_models.spec import NAME, OPSET, Spec, plan
from tests.graph_passes.block_models.tensors import weights

__all__ = [
    "FORM_NAMES",
    "NAME",
    "OPSET",
    "ROUTERS",
    "Spec",
    "build",
    "compute",
    "plan",
    "save",
    "spec_of",
    "weights",
    "why_not",
    "why_not_run",
]
