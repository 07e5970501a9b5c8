"""Plant a fault in the last MoE layer of an exported V-MoE: python break_it.py MODEL.onnx BROKEN.onnx swap|row."""

import sys

import onnx

source, target, fault = sys.argv[1:]
model = onnx.load(source)
for tensor in model.graph.initializer:
    values = onnx.numpy_helper.to_array(tensor).copy()
    if fault == "swap" and tensor.name.startswith("layers.3.mlp.experts."):
        values[[2, 6]] = values[[6, 2]]
    elif fault == "row" and tensor.name == "layers.3.mlp.router.weight":
        values[3] = values[2]
    else:
        continue
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
onnx.save(model, target)
