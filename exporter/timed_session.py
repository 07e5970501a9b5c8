"""A checkpoint in torch that is timed, as it is or compiled by torch.compile."""

from collections import Counter
from pathlib import Path
from typing import Self

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from exporter.torch_session import TorchSession
from models.checkpoints import load_model
from moe_spec.errors import UserError
from moe_spec.manifest import Manifest
from moe_spec.runner import Arrays, Feeds

RECOMPILATIONS = 256
"""Shapes that one function is compiled for. By default torch gives up after 8, and goes on without compiling."""


class TimedSession(TorchSession):
    """A transformers model in float32 that uses ``threads`` threads for one operator, in this whole process.

    ``trust_remote_code`` runs the Python files that the checkpoint's config.json names (`models.own_code`).
    """

    def __init__(self, directory: Path, like: Manifest, threads: int, *, trust_remote_code: bool = False) -> None:
        super().__init__(load_model(directory, trust_remote_code=trust_remote_code), like)
        takes, given = sorted(self.task.axes), sorted(spec.name for spec in like.inputs)
        if takes != given:
            raise UserError(
                f"{directory} takes {', '.join(takes)} in torch, and the model beside it {', '.join(given)}",
                hint="time it beside what moe-edge exported of it",
            )
        self._threads = threads

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


class CompiledSession(TimedSession):
    """The same compiled, for each shape by itself: its first run with a shape is long.

    Raises:
        UserError: there is no C++ compiler, or, when it runs, torch cannot compile the model.
    """

    def __init__(self, directory: Path, like: Manifest, threads: int, *, trust_remote_code: bool = False) -> None:
        require_compiler()
        super().__init__(directory, like, threads, trust_remote_code=trust_remote_code)
        self._directory, self._earlier = directory, Counter(counters["graph_break"])
        (self.model.base_model if self.task.headless else self.model).compile(dynamic=False)

    def _run(self, feeds: Feeds) -> Arrays:
        try:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
                return super()._run(feeds)
        except TorchDynamoException as error:
            raise UserError(
                f"torch.compile fails on {self._directory}: {str(error).strip().splitlines()[0]}",
                hint="leave out --against torch.compile; --debug shows where it failed",
            ) from error

    def breaks(self) -> list[str]:
        """Where Python runs between compiled parts, and how often that was found while compiling."""
        found = Counter(counters["graph_break"]) - self._earlier
        return [f"{count} x {reason.splitlines()[0]}" for reason, count in found.most_common()]


def require_compiler() -> None:
    """See that torch.compile has what it compiles C++ with.

    Raises:
        UserError: there is none.
    """
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "torch.compile needs a C++ compiler, and none was found",
            hint="install g++, or name another in the variable CXX; or leave out --against torch.compile",
        ) from error
