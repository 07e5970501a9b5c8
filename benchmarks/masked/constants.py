"""Sizes, and every constant that a masked graph may read, by name; a graph gets those that it names.

The experts are the same in all layouts, so graphs with one router compute one function, whatever their form.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

EXPERTS, TOP_K, HIDDEN = 8, 2, 64
KEPT = (1, 5)
DROPPED = tuple(expert for expert in range(EXPERTS) if expert not in KEPT)

SWIGLU, RELU = "swiglu", "relu"
WIDTH = {SWIGLU: 128, RELU: 192}
"""F by kind of FFN: three matrices an expert, or two; 24,576 parameters an expert either way."""

Arrays = dict[str, npt.NDArray[Any]]

_INTEGER = re.compile(r"int_\d+|ints(_m?\d+)+")


def weights(ffn: str) -> Arrays:
    """``router`` (E, H), ``gate`` and ``up`` (E, H, F), ``down`` (E, F, H), float32; a relu FFN has no ``gate``."""
    random, width = np.random.default_rng(0), WIDTH[ffn]
    shapes: Mapping[str, tuple[int, ...]] = {
        "router": (EXPERTS, HIDDEN),
        "up": (EXPERTS, HIDDEN, width),
        "down": (EXPERTS, width, HIDDEN),
        "gate": (EXPERTS, HIDDEN, width),
    }
    names = [name for name in shapes if ffn == SWIGLU or name != "gate"]
    return {name: (random.standard_normal(shapes[name]) / np.sqrt(HIDDEN)).astype(np.float32) for name in names}


def constants(text: str, ffn: str) -> Arrays:
    """Those that ``text`` names: weights in any layout, masks, and integers, one of a value for the whole graph."""
    arrays = weights(ffn)
    router = arrays.pop("router")
    known = _stacks(arrays) | _each(arrays) | _router(router)
    words = sorted(set(re.findall(r"\w+", text)))
    integers = {word: _integer(word) for word in words if _INTEGER.fullmatch(word)}
    return {word: known[word] for word in words if word in known} | integers


def _integer(name: str) -> npt.NDArray[np.int64]:
    """``int_2`` is 2, ``ints_m1_64`` is [-1, 64]."""
    kind, *parts = name.split("_")
    values = [int(part.replace("m", "-")) for part in parts]
    return np.asarray(values[0] if kind == "int" else values)


def _stacks(arrays: Arrays) -> Arrays:
    """All experts in one: side by side (H, E F) and (E F, H), or as transformers has them, gate and up in one."""
    inward = {name: array for name, array in arrays.items() if name != "down"}
    found = {f"{name}_stack": array for name, array in arrays.items()}
    found |= {f"{name}_wide": array.transpose(1, 0, 2).reshape(HIDDEN, -1) for name, array in inward.items()}
    found |= {"down_wide": arrays["down"].reshape(-1, HIDDEN), "down_out_in": arrays["down"].transpose(0, 2, 1)}
    if "gate" in arrays:
        found["gate_up_in_out"] = np.concatenate([arrays["gate"], arrays["up"]], axis=2)
        found["gate_up_out_in"] = found["gate_up_in_out"].transpose(0, 2, 1)
    return found


def _each(arrays: Arrays) -> Arrays:
    """``up_3`` (H, F) and so on, one of each for every expert."""
    return {f"{name}_{expert}": arrays[name][expert] for name in arrays for expert in range(EXPERTS)}


def _router(router_EH: npt.NDArray[Any]) -> Arrays:
    """What routers read, and the few floats that other nodes do."""
    dropped = np.isin(np.arange(EXPERTS), DROPPED)
    return {
        "router": router_EH,
        "router_first": router_EH[: len(KEPT)],
        "router_kept": router_EH[list(KEPT)],
        "norm_scale": np.ones(HIDDEN, np.float32),
        "norm_bias": np.zeros(HIDDEN, np.float32),
        "dropped": dropped,
        "never": np.asarray(False),
        "minus_inf": np.asarray(-np.inf, np.float32),
        "minus_inf_if_dropped": np.where(dropped, -np.inf, 0).astype(np.float32),
        "minus_billion_if_dropped": np.where(dropped, -1e9, 0).astype(np.float32),
        "minus_one_if_dropped": np.where(dropped, -1, 0).astype(np.float32),
        "one_if_kept": np.where(dropped, 0, 1).astype(np.float32),
        "zeros": np.zeros(EXPERTS, np.float32),
        "zero": np.asarray(0, np.float32),
        "one": np.asarray(1, np.float32),
    }
