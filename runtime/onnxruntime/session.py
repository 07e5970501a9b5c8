"""A graph that ONNX Runtime has loaded."""

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from moe_spec.decoder import PRESENT, as_past, complete
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Arrays, Feeds, Kept
from runtime.execution import BY_DEFAULT, Execution
from runtime.inputs.feeds import check_feeds, select_outputs
from runtime.onnxruntime.library import as_user_error
from runtime.providers import CPU

_NUMPY = {"float": "float32", "double": "float64"}
_HINT = "check the lengths of the inputs"
_HINT_OF_OTHERS = (
    f"{_HINT}; where they are right, the provider cannot run this graph: write another form, or --provider cpu"
)


class OnnxRuntimeSession:
    """An ONNX graph that is loaded."""

    def __init__(self, session: Any, where: str, execution: Execution = BY_DEFAULT) -> None:
        self._session = session
        self._where = where
        self._hint = _HINT if execution.asked.name == CPU else _HINT_OF_OTHERS
        self._memory = execution.asked.memory
        self._device = int(execution.options.get("device_id", 0))
        self.inputs: tuple[TensorSpec, ...] = tuple(map(_spec, session.get_inputs()))
        self.outputs: tuple[TensorSpec, ...] = tuple(map(_spec, session.get_outputs()))

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name, those asked for or all.

        Raises:
            UserError: the feeds do not fit the inputs, an output is unknown, or ONNX Runtime fails.
        """
        check_feeds(self.inputs, feeds, self._where)
        names = select_outputs(self.outputs, outputs, self._where)
        with as_user_error(f"{self._where} cannot run on these inputs", self._hint):
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def step(self, feeds: Feeds, kept: Kept | None = None) -> tuple[Arrays, Kept]:
        """A step of a decoder; its cache stays in the provider's memory, and is handed on without a copy.

        Raises:
            UserError: the feeds do not fit the inputs, or ONNX Runtime fails.
        """
        given = complete(self.inputs, {**feeds, **(kept or {})})
        if not kept:
            check_feeds(self.inputs, given, self._where)
        with as_user_error(f"{self._where} cannot run on these inputs", self._hint):
            values = self._run_bound(given)
        outputs = {name: value.numpy() for name, value in values.items() if not name.startswith(PRESENT)}
        return outputs, as_past(values)

    def _run_bound(self, given: dict[str, Any]) -> dict[str, Any]:
        """All outputs as ONNX Runtime's values, of arrays and of such values."""
        binding = self._session.io_binding()
        for name, value in given.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for spec in self.outputs:  # each time: what a binding still holds would be written over, whatever its length
            if spec.name.startswith(PRESENT):
                binding.bind_output(spec.name, self._memory, self._device if self._memory != CPU else 0)
            else:
                binding.bind_output(spec.name, CPU)
        self._session.run_with_iobinding(binding)
        return dict(zip([spec.name for spec in self.outputs], binding.get_outputs(), strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None


def _spec(value: Any) -> TensorSpec:
    inner = re.fullmatch(r"tensor\((\w+)\)", value.type)
    kind = inner[1] if inner else value.type
    shape = tuple(
        dim if isinstance(dim, int) else dim or f"{value.name}_{axis}" for axis, dim in enumerate(value.shape)
    )
    return TensorSpec(value.name, _NUMPY.get(kind, kind), shape)
