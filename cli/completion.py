"""What the shell completes: the values that an option knows, read from the tables when they are asked for."""

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


def _criteria() -> Iterable[str]:
    from pruning.criteria import CHANGE_CRITERIA, CRITERIA, DATA_FREE_CRITERIA, NAEE, WEIGHT_CRITERIA
    from pruning.merging.mergers import MERGERS

    return [*CRITERIA, *DATA_FREE_CRITERIA, *WEIGHT_CRITERIA, *CHANGE_CRITERIA, *MERGERS, NAEE]


def _families() -> Iterable[str]:
    from models.support import families

    return [row.model_type for row in families()]


def _forms() -> Iterable[str]:
    from graph_passes.writers import FORMS

    return FORMS


def _formats() -> Iterable[str]:
    from moe_spec.formats import FORMATS

    return FORMATS


def _floats() -> Iterable[str]:
    from moe_spec.formats import FLOATS

    return FLOATS


def _methods() -> Iterable[str]:
    from pruning.finetuning.options import METHODS

    return METHODS


def _precisions() -> Iterable[str]:
    from moe_spec.formats import said
    from runtime.verification.tolerances import TOLERANCES

    return map(said, TOLERANCES)


def _providers() -> Iterable[str]:
    from runtime.providers import PROVIDERS

    return [row.name for row in PROVIDERS]


def _recipes() -> Iterable[str]:
    from pruning.finetuning.recipe import RECIPES

    return RECIPES


def _routers() -> Iterable[str]:
    from moe_spec.layer_plan import ROUTERS

    return ROUTERS


def _scopes() -> Iterable[str]:
    from pruning.budget.scopes import SCOPES, SEARCHED

    return [*SCOPES, SEARCHED]


def _device_maps() -> Iterable[str]:
    from models.spread import DEVICE_MAPS

    return DEVICE_MAPS


def _levels() -> Iterable[str]:
    from runtime.backend import AMPERE_PLUS, SAME_CAPABILITY

    return AMPERE_PLUS, SAME_CAPABILITY


def _scores() -> Iterable[str]:
    from pruning.finetuning.options import SCORES

    return SCORES


def _variants() -> Iterable[str]:
    from pruning.finetuning.options import VARIANTS

    return VARIANTS


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
    "device_map": _device_maps,
    "dtype": _floats,
    "family": _families,
    "form": _forms,
    "hardware_compatibility": _levels,
    "method": _methods,
    "plan router": _routers,
    "plan target": _targets_of_plans,
    "precision": _precisions,
    "optimize precision": _formats,
    "provider": _providers,
    "recipe": _recipes,
    "rest_precision": _formats,
    "scope": _scopes,
    "score": _scores,
    "target": _targets,
    "variant": _variants,
}
"""By parameter, or by verb and parameter where the parameter means something else there."""
