"""What the shell completes: the values that an option knows, read from the tables when they are asked for."""

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Item(NamedTuple):
    """What typer shows as a completion; its own class for it has no public name."""

    value: str
    type: str = "plain"
    help: str | None = None


def complete(verb: str, parameter: Any) -> None:
    """Let the shell complete values of a parameter of a verb, if they are known."""
    values = VALUES.get(f"{verb} {parameter.name}") or VALUES.get(parameter.name)
    if values is not None:
        parameter.shell_complete = lambda _context, start: [
            Item(value) for value in values() if value.startswith(start)
        ]


def _names_in(table: str) -> Callable[[], Iterable[str]]:
    """What stands in a table, ``module:name``; nothing is imported before it is asked for."""
    return lambda: pkgutil.resolve_name(table)


def _criteria() -> Iterable[str]:
    from pruning.criteria import CHANGE_CRITERIA, CRITERIA, DATA_FREE_CRITERIA, NAEE, WEIGHT_CRITERIA
    from pruning.merging.mergers import MERGERS

    return [*CRITERIA, *DATA_FREE_CRITERIA, *WEIGHT_CRITERIA, *CHANGE_CRITERIA, *MERGERS, NAEE]


def _families() -> Iterable[str]:
    from models.support import families

    return [row.model_type for row in families()]


def _precisions() -> Iterable[str]:
    from moe_spec.formats import said
    from runtime.verification.tolerances import TOLERANCES

    return map(said, TOLERANCES)


def _providers() -> Iterable[str]:
    from runtime.providers import PROVIDERS

    return [row.name for row in PROVIDERS]


def _scopes() -> Iterable[str]:
    from pruning.budget.scopes import SCOPES, SEARCHED

    return [*SCOPES, SEARCHED]


def _levels() -> Iterable[str]:
    from runtime.backend import AMPERE_PLUS, SAME_CAPABILITY

    return AMPERE_PLUS, SAME_CAPABILITY


def _ways_of_torch() -> Iterable[str]:
    from cli.options import Against

    return map(str, Against)


def _targets() -> Iterable[str]:
    from runtime.targets import TARGETS

    return [row.name for row in TARGETS]


def _targets_of_plans() -> Iterable[str]:
    from runtime.targets import CHECKPOINT_TARGETS

    return [*_targets(), *(kernels.target for kernels in CHECKPOINT_TARGETS)]


def _backends() -> Iterable[str]:
    from runtime.targets import backends

    return sorted(backends())


VALUES: Mapping[str, Callable[[], Iterable[str]]] = {
    "against": _ways_of_torch,
    "also": _targets,
    "backend": _backends,
    "criterion": _criteria,
    "device_map": _names_in("models.spread:DEVICE_MAPS"),
    "dtype": _names_in("moe_spec.formats:FLOATS"),
    "family": _families,
    "form": _names_in("graph_passes.writers:FORMS"),
    "hardware_compatibility": _levels,
    "method": _names_in("pruning.finetuning.options:METHODS"),
    "plan router": _names_in("moe_spec.layer_plan:ROUTERS"),
    "plan target": _targets_of_plans,
    "precision": _precisions,
    "optimize precision": _names_in("moe_spec.formats:FORMATS"),
    "provider": _providers,
    "recipe": _names_in("pruning.finetuning.recipe:RECIPES"),
    "rest_precision": _names_in("moe_spec.formats:FORMATS"),
    "scope": _scopes,
    "score": _names_in("pruning.finetuning.options:SCORES"),
    "target": _targets,
    "variant": _names_in("pruning.finetuning.options:VARIANTS"),
}
"""By parameter, or by verb and parameter where the parameter means something else there."""
