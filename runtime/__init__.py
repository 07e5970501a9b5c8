"""Open, build, verify, bench and run models on a device. Needs neither torch nor onnx.

Every verb is a function of the module of the same name: ``runtime.build.build``, ``runtime.verify.verify``,
``runtime.bench.bench``, ``runtime.run.run``, ``runtime.bundle.bundle.bundle``, ``runtime.doctor.doctor``. A model is
opened by ``runtime.backends.open_session``. Below them:

- ``backend``, ``backends``, ``onnxruntime``, ``tensorrt``: what builds and opens; ``engine``: what each leaves behind;
- ``targets``, ``providers``: the tables of devices and of ONNX Runtime's providers; ``execution``: how one is to run;
- ``model_dir``, ``onnx_file``, ``profiles``, ``fit``: what a model holds, which shapes it takes, whether it fits;
- ``inputs``: what goes in; ``text``: prompts in, text out;
- ``parity``: how close two models are; ``verification``: what ``verify`` makes of it;
- ``measuring``: what ``bench`` measures with; ``bundle``: what travels to a device.
"""
