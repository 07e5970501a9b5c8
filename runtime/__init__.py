"""Open, build, verify, bench and run models on a device. Needs neither torch nor onnx.

Every verb is a function of the module of the same name: ``runtime.build.build``, ``runtime.verify.verify``,
``runtime.bench.bench``, ``runtime.run.run``. A model is opened by ``runtime.backends.open_session``.
"""
