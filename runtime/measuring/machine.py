"""Where numbers were measured: they mean little without it."""

import importlib.metadata
import os
import platform
from pathlib import Path

from runtime.measuring.pinning import cores

PACKAGES = ("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "numpy")


def describe_machine() -> str:
    """Cores, processor, system, and versions of what computes."""
    count = len(cores()) or os.cpu_count()
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{count} cores of {_processor()}, {system}, {', '.join(_versions())}"


def _processor() -> str:
    """The processor's name, as Linux or Python knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "an unnamed processor"


def _versions() -> list[str]:
    installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
