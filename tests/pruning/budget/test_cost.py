import re

import numpy as np
import pytest

from models.checkpoints import save_model, stored_tensors
from moe_spec.errors import UserError
from moe_spec.plan import BYTES, MILLISECONDS
from pruning.budget.cost import Costs, by_latency, by_number, by_size
from pruning.budget.limit import AtMost, Limit
from pruning.budget.ranked import RankedLayer
from pruning.options import PlanOptions
from pruning.plan import plan
from pruning.prune import prune
from pruning.stored_weights import StoredWeights
from tests.families.configs import tiny
from tests.models_table import TINY


def layers(**options):
    return [RankedLayer(f"layers.{index}", 2, None, np.zeros(8), **options) for index in range(2)]


@pytest.mark.parametrize(
    ("text", "unit", "amount", "is_share"),
    [
        ("30MB", BYTES, 30e6, False),
        ("1.5 GiB", BYTES, 1.5 * 2**30, False),
        ("1B", BYTES, 1, False),
        ("60%", BYTES, 0.6, True),
        ("0.6", BYTES, 0.6, True),
        ("1", BYTES, 1.0, True),
        ("3ms", MILLISECONDS, 3, False),
        (".5s", MILLISECONDS, 500, False),
        ("250us", MILLISECONDS, 0.25, False),
        ("100%", MILLISECONDS, 1.0, True),
    ],
)
def test_an_amount_has_a_unit_and_a_share_has_none(text, unit, amount, is_share):
    parsed = AtMost.parse(text, unit)
    assert (parsed.unit, parsed.is_share, parsed.written) == (unit, is_share, text)
    assert parsed.amount == pytest.approx(amount)


@pytest.mark.parametrize("text", ["", "MB", "30", "0MB", "0", "101%", "-3MB", "3ms", "30 mb", "nan", "1e3MB"])
def test_what_is_neither_amount_nor_share_is_refused(text):
    with pytest.raises(UserError) as caught:
        AtMost.parse(text, BYTES)
    assert caught.value.what == f"--max-size {text} is neither an amount nor a share of what the whole model has"
    assert caught.value.hint == (
        "give a number with B, KB, MB, GB, KiB, MiB, GiB, or a share above 0 and at most 1, like 0.6 or 60%"
    )


@pytest.mark.parametrize("name", TINY)
def test_sizes_are_those_of_the_checkpoint_that_prune_writes(name, tmp_path):
    checkpoint = tmp_path / name
    save_model(TINY[name](), checkpoint)
    costs = by_size(checkpoint)
    plan(checkpoint, PlanOptions(4, "random"), tmp_path / "plan.json")
    pruned = prune(checkpoint, tmp_path / "plan.json", tmp_path / "pruned")
    for directory, total in ((checkpoint, costs.whole), (pruned, costs.total([4, 4]))):
        assert sum(tensor.nbytes for tensor in stored_tensors(directory).values()) == total
    assert [len(of_layer) for of_layer in costs.by_count] == [9, 9]


def test_what_cannot_be_reached_is_refused_with_the_nearest_that_can():
    limit = Limit(Costs(BYTES, 1000, [range(0, 801, 100)] * 2), 1300, "1300B")
    with pytest.raises(UserError) as caught:
        limit.check(layers())
    assert caught.value.what == (
        "--max-size 1300B cannot be reached: with 2 of 8 experts a layer, the fewest, it is 1,400 bytes"
    )
    assert caught.value.hint == "the nearest that works: --max-size 1400B; or let K shrink: --clamp-top-k"
    limit.check(layers(clamp_top_k=True))
    with pytest.raises(
        UserError, match=re.escape("with 1 of 8 experts a layer, the fewest, it is 1,200 bytes")
    ) as caught:
        Limit(limit.costs, 1199, "1199B").check(layers(clamp_top_k=True))
    assert caught.value.hint == "the nearest that works: --max-size 1200B"


def test_the_nearest_is_what_can_be_asked_for():
    costs = Costs(MILLISECONDS, 1.00004, [[0.0] * 9] * 2)
    with pytest.raises(UserError) as caught:
        Limit(costs, 0.5, "50%").check(layers())
    (nearest,) = re.findall(r"--max-latency (\S+ms)", caught.value.hint)
    Limit(costs, AtMost.parse(nearest, MILLISECONDS).limit(costs.whole), "").check(layers())


def test_latency_is_interpolated_between_what_was_measured_and_never_falls():
    asked: list[tuple[int, list[int]]] = []

    def measure(plans):
        asked.extend((count, [len(layer.keep) for layer in kept]) for count, kept in plans.items())
        return {2: 1.0, 4: 3.0, 5: 2.0, 6: 4.0, 8: 6.0}

    costs = by_latency(layers(), measure)
    assert asked == [(count, [count, count]) for count in (2, 4, 5, 6, 8)]
    assert [costs.total([count, count]) for count in range(2, 9)] == pytest.approx([1, 2, 3, 3, 4, 5, 6])
    assert costs.total([2, 8]) == pytest.approx(3.5)
    assert costs.whole == pytest.approx(6)


def test_every_expert_counts_as_one():
    assert (by_number(layers()).total([3, 5]), by_number(layers()).whole) == (8, 16)


def test_two_layers_in_one_list_have_no_sizes_of_their_own(tmp_path):
    save_model(tiny("ernie4_5_vl_moe"), tmp_path)
    for ask in (by_size, StoredWeights):
        with pytest.raises(UserError) as error:
            ask(tmp_path)
        assert (error.value.what, error.value.hint) == (
            f"{tmp_path} has the experts of several layers in one list",
            "plan from statistics of `moe-edge calibrate`, by --keep with a number or a share of experts",
        )
