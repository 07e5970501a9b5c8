"""Build, verify, bench and run on the device. Needs neither torch nor onnx."""
