"""What the extras of moe-edge bring: ``pip install 'moe-edge[EXTRA]'``."""

from collections.abc import Mapping

MODULES: Mapping[str, tuple[str, ...]] = {
    "optimize": ("onnx", "onnx_graphsurgeon", "ml_dtypes", "scipy"),
    "export": ("torch", "transformers", "onnxscript"),
    "prune": ("torch", "transformers", "accelerate", "msgpack", "sklearn", "ml_dtypes", "scipy"),
    "text": ("jinja2", "tokenizers"),
    "report": ("vl_convert", "jinja2"),
    "tensorrt-rtx": ("tensorrt_rtx",),
    "tensorrt": ("tensorrt",),
    "samples": ("gguf",),
    "bench": ("onnxoptimizer", "onnxscript", "onnxsim", "onnxslim"),
    "docs": ("material", "mkdocs", "mkdocstrings"),
}
"""Modules by the extra that brings them; ``export`` brings what ``optimize`` and ``prune`` bring, too."""


def extra_of(module: str) -> str | None:
    """The first extra that brings a module, or a part of one; None: none does.

    >>> extra_of("torch.nn"), extra_of("numpy")
    ('export', None)
    """
    package = module.partition(".")[0]
    return next((extra for extra, modules in MODULES.items() if package in modules), None)
