"""torch to ONNX: one node a MoE layer, whatever the family."""
