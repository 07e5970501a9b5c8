"""A cut model that is given what it computed itself computes it again, part by part."""

import numpy as np
import pytest

from graph_passes.variants.cut import save_cut, save_watched
from moe_spec.runner import error_between
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.graph_passes.block_models import FORM_NAMES, spec_of, why_not_run
from tests.graph_passes.readers.proofs import saved

RUNNER = OnnxRuntimeRunner(threads=1)
FORMS = [name for name in FORM_NAMES if why_not_run(spec_of(name)) is None]


def values_and_parts(model, folder, x):
    """What the watched model shows, and what the parts of the cut one make of it, by output of the watched one."""
    watched = save_watched(model, folder / "parts")
    cut = save_cut(model, folder / "parts", [layer.name for layer in watched.layers])
    values = RUNNER.run(watched.path, [{"x": x}])[0]
    feeds = {"x": x}
    for seen, layer in zip(watched.layers, cut.layers, strict=True):
        feeds |= {layer.given_hidden: values[seen.hidden], layer.given_out: values[seen.out]}
        if layer.forced is not None:
            ids = np.argsort(-np.abs(values[seen.gates]), axis=1)[:, : layer.top_k]
            weights = np.take_along_axis(values[seen.gates], ids, axis=1)
            feeds |= dict(zip(layer.forced, (ids, weights), strict=True))
    parts = RUNNER.run(cut.path, [feeds])[0]
    shown = {name: name for name in watched.outputs}
    for seen, layer in zip(watched.layers, cut.layers, strict=True):
        shown |= {getattr(seen, name): getattr(layer, name) for name in ("hidden", "out", "gates", "scores")}
    return watched, cut, {name: (values[name], parts[other]) for name, other in shown.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_part_of_every_form_computes_what_it_did(tmp_path, form):
    spec = spec_of(form)
    x = np.random.default_rng(0).standard_normal((7, spec.hidden)).astype(spec.dtype)
    watched, cut, pairs = values_and_parts(saved(spec, tmp_path), tmp_path, x)
    assert len(watched.layers) == len(cut.layers) >= 1
    for value, part in pairs.values():
        assert error_between(value, part)[1] <= 1e-5


@pytest.mark.parametrize("kind", ["softmax_renormalised", "softmax_groups", "sigmoid_bias_eps", "sigmoid_bias_groups"])
def test_a_forced_choice_leaves_what_the_router_says(tmp_path, kind):
    """The router gathers its weights by its ids: by its own, whatever the experts are told."""
    spec = spec_of("batched_mm", kind)
    x = np.random.default_rng(0).standard_normal((7, spec.hidden)).astype(spec.dtype)
    watched, _, pairs = values_and_parts(saved(spec, tmp_path), tmp_path, x)
    value, part = pairs[watched.layers[0].gates]
    np.testing.assert_array_equal(value, part)


def test_only_the_layers_asked_for_are_cut(tmp_path):
    assert save_cut(saved(spec_of("batched_mm"), tmp_path), tmp_path / "cut", []).layers == ()
