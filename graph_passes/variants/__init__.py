"""The files beside model.onnx that share its weights: routers or experts shown, routing given, layers cut apart."""
