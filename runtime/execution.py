"""How ONNX Runtime is to run a model: on which provider, with which options, and what may be left to the CPU."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError, require_known
from runtime.providers import CPU, Provider, find_provider


@dataclasses.dataclass(frozen=True)
class Execution:
    """How ONNX Runtime is to run a model, besides the threads of an operator.

    Attributes:
        provider: a name of `PROVIDERS`; None for what an engine was built for, and the CPU for models.
        options: for the provider, as ONNX Runtime has them.
        cpu_fallback: whether nodes that the provider does not take may run on the CPU.
        parallel: operators that may run at once, where the graph has branches.
        spinning: whether threads without work wait busily: quicker, and a core that nobody else can use.
        cache: directory that keeps what was made of a model when it was opened: the next time takes it from there.
    """

    provider: str | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cpu_fallback: bool = False
    parallel: int = 1
    spinning: bool = True
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what the provider does not take.

        Raises:
            UserError: an unknown provider or option, or no operator at all may run.
        """
        asked = self.asked
        for option in self.options:
            require_known(option, f"option of the provider {asked.name}", asked.options)
        if self.parallel < 1:
            raise UserError(f"{self.parallel} operators may run at once, expected 1 or more", hint="give 1 or more")

    @property
    def asked(self) -> Provider:
        """The row of the provider."""
        return find_provider(CPU if self.provider is None else self.provider)

    def __str__(self) -> str:
        """The provider and the options that were asked for.

        >>> str(Execution("cuda", {"device_id": "1"}))
        'cuda with device_id=1'
        """
        options = ", ".join(f"{name}={value}" for name, value in sorted(self.options.items()))
        return f"{self.asked.name} with {options}" if options else self.asked.name

    def settled(self, threads: int, cache: Path | None = None) -> "Execution":
        """With all options that the provider is given, see `Defaults`.

        Raises:
            UserError: the provider keeps nothing in a cache, or an option says where.
        """
        chosen = self.asked.defaults(threads, cache)
        keeps = {name for name, value in chosen.items() if value != self.asked.defaults(threads, None).get(name)}
        if cache is not None and (not keeps or keeps & self.options.keys()):
            why = f"has the option {', '.join(sorted(keeps))} for it" if keeps else "keeps nothing"
            raise UserError(f"the provider {self.asked.name} {why}, so --cache says nothing", hint="leave --cache out")
        return dataclasses.replace(self, options={**chosen, **self.options})

    def to_json(self) -> dict[str, Any]:
        """For another process, see `of_json`."""
        return dataclasses.asdict(self) | {"cache": None if self.cache is None else str(self.cache)}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "Execution":
        """What `to_json` wrote.

        >>> execution = Execution("cuda", {"device_id": "1"}, cache=Path("cache"))
        >>> Execution.of_json(execution.to_json()) == execution
        True
        """
        cache = values["cache"]
        return cls(**{**values, "cache": None if cache is None else Path(cache)})


BY_DEFAULT = Execution()
"""Models on the CPU, engines as they were built."""


def parse_options(given: Iterable[str]) -> dict[str, str]:
    """Options of a provider as the command line takes them.

    >>> parse_options(["device_id=1", "cache_dir=/tmp/a=b"])
    {'device_id': '1', 'cache_dir': '/tmp/a=b'}

    Raises:
        UserError: one has no ``=``, or comes twice.
    """
    options: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name in options:
            raise UserError(
                f"the provider option {text!r} {'comes twice' if equals else 'has no value'}",
                hint="give each once, as NAME=VALUE",
            )
        options[name] = value
    return options
