"""ONNX to ONNX: read MoE blocks into one record, prune the record, write the form that a target wants."""
