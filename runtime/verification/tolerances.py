"""How far a candidate may be from its reference: one table, and a file of other rows where somebody knows better.

A flip is a token that selects other experts; rounding causes flips where two experts score almost the same, so a flip
is excused where the reference's margin is within rounding of the scores, which is that of the hidden states below them.

Float rows are the usual ones of each format: NVIDIA tests strongly typed fp16 at 5e-3, PyTorch and TransformerEngine
bf16 at 1.6e-2. Rows of quantised experts are measured, three to four times what was seen: the embedded V-MoE is off by
2.9e-3 of its largest logit in int8 and by 6.8e-2 in int4 with blocks of 32, a random Mixtral in int8 by 1.2e-2. Of its
2.9e-3 in fp16, 3.1e-3 are there with fp16 weights and float32 arithmetic: the weights' rounding, nobody's fault.
In fp8 (e4m3) it is off by 1.2e-2, and its flips had margins of up to 6.0e-2; in nvfp4 by 6.3e-2 and 2.4e-1, so that is
judged as int4 is. With all weights and what they multiply in int8 (w8a8) it is off by 3.5e-2, and its flips had margins
of up to 1.1e-1.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import require_file
from moe_spec.formats import in_onnx, require_format, said
from moe_spec.record import Record, parse_object


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What is allowed.

    Attributes:
        element: largest difference of an output over its largest magnitude, on examples without flips and under the
            reference's routing.
        margin: largest relative margin of the reference at which a flip is excused; and largest difference of a gate.
        flips: share of a layer's tokens that may flip.
        accuracy: what the task's accuracy may lose; a candidate fails where its confidence interval says that it lost
            more.
    """

    element: float
    margin: float
    flips: float
    accuracy: float = 0.0


TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(element=1e-5, margin=1e-4, flips=0.01),
    "float16": Tolerance(element=5e-3, margin=2e-2, flips=0.05),
    "bfloat16": Tolerance(element=1.6e-2, margin=1.6e-1, flips=0.20),
    "int8": Tolerance(element=4e-2, margin=1e-1, flips=0.20, accuracy=0.01),
    "float8e4m3fn": Tolerance(element=4e-2, margin=2e-1, flips=0.20, accuracy=0.01),
    "w8a8": Tolerance(element=1.2e-1, margin=4e-1, flips=0.20, accuracy=0.01),
    "float4e2m1": Tolerance(element=2e-1, margin=5e-1, flips=0.30, accuracy=0.02),
    "int4": Tolerance(element=2e-1, margin=5e-1, flips=0.30, accuracy=0.02),
}
"""By number format (ONNX names), the finest first; those of 8 bits and less are of weights."""


def coarsest(formats: Iterable[str]) -> str:
    """The format of ``TOLERANCES`` that decides when these are mixed.

    >>> coarsest({"float16", "float32"})
    'float16'

    Raises:
        UserError: there is a format for which no tolerance can be told beforehand.
    """
    found = set(formats) - {"float64"}
    unknown = sorted(found - set(TOLERANCES))
    if unknown:
        raise UserError(
            f"there is no element tolerance for {', '.join(unknown)}",
            hint=f"choose the format to judge by: --precision {', '.join(map(said, TOLERANCES))}",
        )
    return max(found or {"float32"}, key=list(TOLERANCES).index)


def tolerance_of(precision: str, tolerances: Mapping[str, Tolerance] = TOLERANCES) -> Tolerance:
    """The row of ``tolerances`` for ``precision``, in words of people or of ONNX.

    Raises:
        UserError: there is none.
    """
    return tolerances[in_onnx(require_format(precision, [said(name) for name in tolerances]))]


def load_tolerances(path: Path) -> dict[str, Tolerance]:
    """``TOLERANCES`` with what the JSON file ``path`` says otherwise: ``{"int8": {"element": 0.05}}``.

    Raises:
        UserError: no JSON, an unknown precision or name, or a value that is no number of 0 or more.
    """
    mend = f'write rows like {{"int8": {{"element": 0.05}}}}, of {", ".join(map(said, TOLERANCES))}'
    require_file(path, "tolerances (JSON)")
    rows = parse_object(path, path.read_bytes(), mend)
    record, changed = Record(rows, str(path), mend), dict(TOLERANCES)
    for precision in rows:
        row, name = record.record(precision), in_onnx(precision)
        if name not in TOLERANCES or row is None:
            raise record.fail(f"{precision!r} is no precision with a row of tolerances")
        changed[name] = _changed(TOLERANCES[name], row, rows[precision])
    return changed


def _changed(tolerance: Tolerance, row: Record, names: Iterable[str]) -> Tolerance:
    known = {field.name for field in dataclasses.fields(Tolerance)}
    for name in names:
        if name not in known:
            raise row.fail(f"unknown tolerance {name!r}, known are {', '.join(sorted(known))}")
        if not row.take(name, float) >= 0:
            raise row.fail(f"{name} is {row.take(name, float)}, expected 0 or more")
    return dataclasses.replace(tolerance, **{name: row.take(name, float) for name in names})
