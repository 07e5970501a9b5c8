"""Operators that ONNX Runtime has in ONNX's own domain, and that the checker does not know.

transformers' fused exports hold one: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import functools

import onnx.defs
from onnx.defs import OpSchema

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]

_RMS_NORM = OpSchema(
    "SimplifiedLayerNormalization",
    "",
    1,
    inputs=[OpSchema.FormalParameter("X", "T"), OpSchema.FormalParameter("scale", "V")],
    outputs=[
        OpSchema.FormalParameter("Y", "V"),
        OpSchema.FormalParameter("inv_std_var", "U", param_option=OpSchema.FormalParameterOption.Optional),
    ],
    type_constraints=[(name, _FLOATS, "") for name in ("T", "U", "V")],
    attributes=[
        OpSchema.Attribute("axis", OpSchema.AttrType.INT, ""),
        OpSchema.Attribute("epsilon", OpSchema.AttrType.FLOAT, ""),
        OpSchema.Attribute("stash_type", OpSchema.AttrType.INT, ""),
    ],
)


@functools.cache
def register() -> None:
    """Tell the checker of this process about them."""
    if not onnx.defs.has(_RMS_NORM.name):
        onnx.defs.register_schema(_RMS_NORM)
