"""Where ONNX Runtime spends its time in a graph, by its own profiler."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime as ort

from moe_spec.runner import Feeds

RUNS = 20
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "Conv")


def products_of(model: Path, feeds: Feeds, threads: int) -> str:
    """How much of the time in nodes goes to products of matrices, and in how many nodes; measured by itself.

    Args:
        model: the .onnx file.
        feeds: what it is run with.
        threads: that one operator may use.
    """
    with tempfile.TemporaryDirectory() as scratch:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "profile")
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_bytes())
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"]].append(event["dur"])
    medians = {node: float(np.median(found)) for node, found in times.items()}
    products = [found for (op, _), found in medians.items() if op in PRODUCTS]
    share = sum(products) / sum(medians.values())
    return f"{share:.0%} of the time in its {len(medians)} nodes goes to the {len(products)} products of matrices"
