"""The page of tables: targets, forms, criteria, tolerances and families, read from where the code reads them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from inspect import getdoc
from types import ModuleType

from benchmarks.markdown import table
from graph_passes.readers import READERS
from graph_passes.writers import WRITERS
from models.support import STAGES, families, tools
from moe_spec.formats import FLOATS, FORMATS, said
from moe_spec.layer_plan import ROUTERS
from moe_spec.statistics import KEYS
from pruning.criteria import CHANGE_CRITERIA, CRITERIA, DATA_FREE_CRITERIA, NAEE, PAPERS, WEIGHT_CRITERIA
from pruning.criteria.moments import Moment
from pruning.merging.mergers import MERGERS
from runtime.providers import PROVIDERS
from runtime.targets import PLUGINS, TARGETS
from runtime.verification.tolerances import TOLERANCES


def page() -> str:
    """All tables, the command that prints each where there is one."""
    tables = (_targets(), _providers(), _formats(), _forms(), _criteria(), _tolerances(), _families())
    return "\n\n".join(("# Tables", *itertools.chain(*tables))) + "\n"


def _targets() -> Iterator[str]:
    yield "## Targets"
    yield "`moe-edge targets` prints this; with a model it says which of them take it, and whether it fits."
    head: tuple[str, ...] = (
        "target",
        "other names",
        "builds with",
        "compute capability",
        "forms",
        "formats",
        "GB",
        "note",
    )
    rows = [
        (
            _code(row.name),
            _codes(row.aliases),
            f"{row.backend} {row.versions}",
            row.compute_capability or "",
            _codes(row.forms),
            " ".join(short for short, name in FORMATS.items() if name in row.precisions),
            "" if row.gigabytes is None else " to ".join(dict.fromkeys(map(str, row.gigabytes))),
            row.note,
        )
        for row in TARGETS
    ]
    yield table(head, rows, left=len(head))
    yield "Plugins of TensorRT-Edge-LLM build from a pruned checkpoint. `plan --target` keeps what their kernels take."
    head = ("target of `plan`", "plugin", "experts", "largest K", "note")
    plugins = [
        (
            _code(row.kernels.target),
            row.name,
            " or ".join(map(str, row.kernels.counts)) or "any",
            str(row.kernels.max_top_k or "any"),
            row.note,
        )
        for row in PLUGINS
    ]
    yield table(head, plugins, left=len(head))


def _providers() -> Iterator[str]:
    yield "## Providers"
    yield "What ONNX Runtime computes on: `--provider` of `run`, `bench` and `verify`."
    rows = [
        (_code(row.name), row.official, _code(f"pip install {row.package}"), row.needs, _codes(row.options))
        for row in PROVIDERS
    ]
    yield table(("provider", "ONNX Runtime's name", "brought by", "needs", "`--provider-option`"), rows, left=5)


def _formats() -> Iterator[str]:
    yield "## Formats"
    yield "What `optimize --precision` (experts) and `--rest-precision` (all but routers) take."
    rows = [
        (
            _code(name),
            onnx,
            "a float that the graph computes in" if name in FLOATS else "of weights, which are floats when multiplied",
            _codes(row.name for row in TARGETS if onnx in row.precisions),
        )
        for name, onnx in FORMATS.items()
    ]
    yield table(("format", "in ONNX", "what it is", "taken by"), rows, left=4)


def _forms() -> Iterator[str]:
    yield "## Forms of a MoE layer"
    yield "Read: recognised in a graph, whoever exported it. A reader looks for one kind of node first."
    yield table(
        ("form", "looks for"), [(_code(reader.FORM), reader.LOOKS_FOR.rstrip(",")) for reader in READERS], left=2
    )
    yield "Written: what `optimize --form` takes; `auto` chooses among those that the target takes."
    rows = [
        (_code(form), _first_sentence(module), _codes(row.name for row in TARGETS if form in row.forms))
        for form, module in WRITERS.items()
    ]
    yield table(("form", "what it is", "taken by"), rows, left=3)


def _criteria() -> Iterator[str]:
    yield "## Criteria"
    yield "`plan --criterion NAME` ranks experts; higher is kept, and ties go to the lower id."
    groups: Mapping[str, Mapping[str, object]] = {
        "statistics": CRITERIA,
        "weights": WEIGHT_CRITERIA,
        "weights before and after": CHANGE_CRITERIA,
        "nothing": DATA_FREE_CRITERIA,
    }
    rows = [
        (_code(name), needs, _score(score), _paper(name))
        for needs, named in groups.items()
        for name, score in named.items()
    ]
    searched = (_code(NAEE), "`--data`", "how little each layer's output changes, by search", _paper(NAEE))
    yield table(("criterion", "needs", "ranks by", "paper"), [*rows, searched], left=4)
    yield "Mergers average experts instead of dropping them."
    head: tuple[str, ...] = (
        "merger",
        "groups",
        "aligns neurons",
        "`calibrate --dense`",
        "router",
        "in the paper",
        "paper",
    )
    mergers = [
        (
            _code(name),
            _first_sentence(row.group),
            _yes(row.align),
            _yes(row.dense),
            _code(row.router),
            _code(row.published),
            _paper(name),
        )
        for name, row in MERGERS.items()
    ]
    yield table(head, mergers, left=len(head))
    yield "What becomes of the router: `plan --router NAME`."
    yield table(("router", "what it does"), [(_code(name), what) for name, what in ROUTERS.items()], left=2)
    yield "Statistics that criteria are made of, one value for each axis of a layer: E experts, H hidden width."
    head = ("statistic", "axes", "what it is", "`--dense`")
    keys = [(_code(name), ", ".join(key.axes), _cell(key.what), _yes(key.dense)) for name, key in KEYS.items()]
    yield table(head, keys, left=len(head))


def _tolerances() -> Iterator[str]:
    yield "## Tolerances"
    yield (
        "What `verify` allows, by the coarsest number format of the candidate. *Element*: largest difference of an "
        "output over its largest magnitude. *Margin*: of the reference's router, up to which a flip is rounding. "
        "*Flips*: share of a layer's tokens. *Accuracy*: what the task may lose. `--tolerances FILE` changes rows."
    )
    rows = [
        (_code(said(name)), f"{row.element:g}", f"{row.margin:g}", f"{row.flips:g}", f"{row.accuracy:g}")
        for name, row in TOLERANCES.items()
    ]
    yield table(("format", "element", "margin", "flips", "accuracy"), rows)


def _families() -> Iterator[str]:
    yield "## Families"
    versions = ", ".join(f"{name} {version}" for name, version in tools().items())
    yield (
        "What `python -m benchmarks.families` proved with a small random model of each, with "
        f"{versions}. `moe-edge families FAMILY` says the same of one."
    )
    yield "\n".join(f"- *{stage}*: {_cell(meaning)}" for stage, meaning in STAGES.items())
    rows = []
    for row in families():
        reasons = {stage: row.reason(stage) for stage in STAGES}
        why = "; ".join(f"{stage}: {reason}" for stage, reason in row.why_not.items())
        rows.append((_code(row.model_type), *(_yes(reason is None) for reason in reasons.values()), _cell(why)))
    yield table(("family", *STAGES, "why not"), rows, left=len(STAGES) + 2)


def _paper(name: str) -> str:
    """A link to where the criterion or merger ``name`` was published."""
    title, link = PAPERS.get(name, ("", ""))
    return f"[{title}]({link})" if link else ""


def _score(score: object) -> str:
    """A criterion in a line: a moment by its powers, a function by what its docstring says first."""
    if isinstance(score, Moment):
        summed = {(0, 0): "tokens that selected it"}.get((score.alpha, score.beta), _product(score))
        return f"{'mean' if score.b else 'sum'} of {summed}" if score.alpha or score.beta else f"number of {summed}"
    return _first_sentence(score)


def _product(score: Moment) -> str:
    powers = (("gate", score.alpha), ("output norm", score.beta))
    return " × ".join(f"{what}{' squared' * (power == 2)}" for what, power in powers if power)


def _first_sentence(thing: ModuleType | object) -> str:
    """What a docstring says first, up to a colon; of a form, which its name and a colon stand before, behind that."""
    name, _, said = (getdoc(thing) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`").partition(": ")
    return _cell((said if name.startswith("Form ") else name).rstrip("."))


def _code(name: str) -> str:
    return f"`{name}`"


def _codes(names: Iterable[str]) -> str:
    return " ".join(map(_code, names))


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
