"""What cannot be written, and why."""

from tests.graph_passes.block_models.spec import Spec


def why_not(spec: Spec) -> str | None:
    """Why no model is like this; None if one can be."""
    return next((reason for reason, applies in _reasons(spec).items() if applies), None)


def _reasons(spec: Spec) -> dict[str, bool]:
    dense = spec.form in ("stacked", "masked_loop") or (spec.form == "nonzero" and spec.hit == "gates")
    drops = spec.form == "dispatch" or (spec.selection == "argmax" and spec.gates == "mask" and dense)
    return {
        "the weights of this form multiply the outputs": spec.weights_on == "input"
        and spec.form not in ("stacked", "masked_loop", "nonzero"),
        "a bias passes an input gate of 0": spec.weights_on == "input" and spec.biased,
        "the function of our node needs opset 18": spec.form == "experts" and spec.opset < 18,
        "a capacity needs places, or a mask (T, E)": spec.capacity is not None
        and spec.selection != "two_argmax"
        and not drops,
        "its weights are renormalised after dropping, which dispatch does before": spec.form == "dispatch"
        and spec.selection == "two_argmax",
        "scores of the K best cannot be scattered before they are there": spec.gates == "minus_inf"
        and not spec.topk_first,
        "scores times a mask are scores of all experts": spec.gates == "mask" and spec.topk_first,
    }
