"""Say what is in a checkpoint, model, engine, bundle, plan, statistics, fine-tuning or report.

Of a model: its MoE layers, with their number of experts, K (how many of them a token gets), kind of router, and bytes;
layers that look like MoE and were not recognised, with the reason; and experts that no input can choose.

Example: moe-edge inspect checkpoint/
Example: moe-edge inspect exported/model.onnx
Example: moe-edge inspect plan.json --json
"""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import AsJson, TrustRemoteCode
from cli.trust import warn_of_code
from moe_spec.errors import UserError
from moe_spec.files import not_there
from moe_spec.record import Json, parse_object

if TYPE_CHECKING:
    from graph_passes.record.block import MoEBlock

Description = tuple[str, Json]


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="Directory of a checkpoint, model, engine or bundle; or a file: .onnx, .json, .safetensors."
        ),
    ],
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what is in a file or directory that moe-edge makes or reads."""
    if not path.exists():
        raise not_there(path, "a directory or a file that moe-edge makes or reads")
    warn_of_code(path, trusted=trust_remote_code)
    with console.progress(f"reading {path}"):
        summary, payload = _describer(path, trust_remote_code=trust_remote_code)(path)
    console.result(summary, payload, as_json)


def _describer(path: Path, *, trust_remote_code: bool) -> Callable[[Path], Description]:
    if path.is_dir():
        return partial(_directory, trust_remote_code=trust_remote_code)
    by_suffix: Mapping[str, Callable[[Path], Description]] = {
        ".onnx": _onnx,
        ".json": _json,
        ".safetensors": _statistics,
    }
    if path.suffix not in by_suffix:
        raise UserError(
            f"{path} is nothing that moe-edge makes or reads", hint=f"known: a directory, *{', *'.join(by_suffix)}"
        )
    return by_suffix[path.suffix]


def _directory(path: Path, *, trust_remote_code: bool = False) -> Description:
    from moe_spec.manifest import FILE_NAME, MODEL, Manifest
    from runtime.backend import ENGINE
    from runtime.bundle.bundle import KIND

    if (path / FILE_NAME).is_file():
        return _engine(path) if Manifest.load(path).kind in (ENGINE, KIND) else _onnx(path)
    if (path / MODEL).is_file():
        return _onnx(path)
    if not (path / "config.json").is_file():
        known = f"{FILE_NAME}, {MODEL} nor config.json"
        raise UserError(f"{path} has neither {known}", hint="give a checkpoint, or what a verb of moe-edge wrote")
    return _checkpoint(path, trust_remote_code=trust_remote_code)


def _onnx(path: Path) -> Description:
    from graph_passes.describe import inspect_model
    from graph_passes.unreachable import summarise

    model = inspect_model(path)
    blocks = [_found(block) for block in model.blocks]
    blocks += [dataclasses.asdict(entry) for entry in (*model.settled, *model.choosing)]
    lines = [f"{model.path}: {len(model.graph.nodes)} nodes, {len(blocks)} MoE layers"]
    lines += [_row(block) for block in blocks]
    unknown = () if model.choosing else model.unrecognised
    lines += [textwrap.indent(f"not recognised: {layer}", "  ") for layer in unknown]
    unreachable = [item for found in model.findings for item in found.unreachable]
    masked = [item for found in model.findings for item in found.not_proven]
    lines += [f"  unreachable: {line}" for line in summarise(unreachable)]
    lines += [f"  masked as it seems: {line}" for line in summarise(masked)]
    unrecognised = [dataclasses.asdict(layer) for layer in unknown]
    payload = {
        "nodes": len(model.graph.nodes),
        "blocks": blocks,
        "unrecognised": unrecognised,
        "unreachable": [dataclasses.asdict(item) for item in unreachable],
        "not_proven": [dataclasses.asdict(item) for item in masked],
        "source_sha256": model.source_sha256,
    }
    return "\n".join(lines), payload


def _found(block: "MoEBlock") -> Json:
    return {
        "name": block.name,
        "form": block.form,
        "experts": block.num_experts,
        "top_k": block.router.top_k,
        "router": block.router.kind,
        "activation": dataclasses.asdict(block.experts.activation),
        "bytes": block.nbytes,
        "keep": list(block.keep),
    }


def _row(block: Mapping[str, Any]) -> str:
    router = block["router"] or "no router"
    return (
        f"  {block['name']}: {block['experts']} experts, K={block['top_k']}, {router}; "
        f"form {block['form']}, {block['bytes']:,} bytes"
    )


def _engine(path: Path) -> Description:
    from moe_spec.manifest import Manifest

    manifest = Manifest.load(path)
    known = {key: value for key, value in manifest.details.items() if key != "profiles"}  # `arguments` has them
    lines = [f"{path}: {manifest.kind}, {sum(entry.bytes for entry in manifest.files):,} bytes"]
    said = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in known.items()}
    lines += [f"  {key}: {value}" for key, value in said.items() if value and isinstance(value, str | int | float)]
    lines += [_row(block) for block in manifest.to_json()["blocks"]]
    return "\n".join(lines), manifest.to_json()


def _checkpoint(path: Path, *, trust_remote_code: bool) -> Description:
    from models.checkpoints import load_skeleton
    from models.moe_layers import find_moe_layers
    from moe_spec.identity import checkpoint_sha256

    layers = find_moe_layers(load_skeleton(path, trust_remote_code=trust_remote_code))
    identity = checkpoint_sha256(path)
    payload = [
        {
            "name": layer.name,
            "experts": layer.num_experts,
            "top_k": layer.top_k,
            "router": type(layer.router).__name__,
            "groups": None if layer.groups is None else dataclasses.asdict(layer.groups),
        }
        for layer in layers
    ]
    lines = [f"{path}: checkpoint {identity[:12]}, {len(layers)} MoE layers"]
    lines += [f"  {row['name']}: {row['experts']} experts, K={row['top_k']}, {row['router']}" for row in payload]
    return "\n".join(lines), {"sha256": identity, "layers": payload}


def _json(path: Path) -> Description:
    by_artifact: Mapping[str, Callable[[Path], Description]] = {
        "bench": _bench,
        "finetuning": _finetuning,
        "manifest": lambda manifest: _directory(manifest.parent),
        "parity": _parity,
        "plan": _plan,
    }
    known = f"known artifacts: {', '.join(by_artifact)}"
    artifact = str(parse_object(path, path.read_bytes(), known).get("artifact"))
    if artifact not in by_artifact:
        raise UserError(f"{path} is no artifact of moe-edge", hint=known)
    return by_artifact[artifact](path)


def _parity(path: Path) -> Description:
    from cli.parity import reasons, summary
    from runtime.verification.report import ParityReport

    report = ParityReport.load(path)
    failed = [] if report.passed else [f"  {reason}" for reason in reasons(report)]
    return "\n".join([f"{path}: {summary(report)}", *failed]), report.to_json()


def _bench(path: Path) -> Description:
    from cli.parity import cost
    from runtime.bench_report import BenchReport

    report = BenchReport.load(path)
    return "\n".join([f"{path}: {report.machine}", *cost(report.rows)]), report.to_json()


def _finetuning(path: Path) -> Description:
    from report.artifacts import load_finetuning

    record = load_finetuning(path)
    teacher = "" if record.teacher_sha256 is None else f", taught by {record.teacher_sha256[:12]}"
    lines = [f"{path}: {record.method} fine-tuning of model {record.model_sha256[:12]}{teacher}"]
    options = {**record.options, **record.recipe}
    lines += [f"  {name}: {value}" for name, value in options.items() if value is not None]
    return "\n".join(lines), dataclasses.asdict(record)


def _plan(path: Path) -> Description:
    from moe_spec.layer_plan import ROWS
    from moe_spec.plan import PruningPlan

    plan = PruningPlan.load(path)
    lines = [f"{path}: plan {plan.by} for model {plan.model_sha256[:12]}"]
    lines += [
        f"  {layer.name}: keeps {len(layer.keep)} of {layer.experts}, K={layer.top_k}"
        f"{'' if layer.router == ROWS else f', router {layer.router}'}: {list(layer.keep)}"
        for layer in plan.layers
    ]
    return "\n".join(lines), plan.to_json()


def _statistics(path: Path) -> Description:
    from moe_spec.statistics import Statistics

    statistics = Statistics.load(path)
    lines = [f"{path}: statistics of model {statistics.model_sha256[:12]}"]
    lines += [
        f"  {layer.name}: {layer.token_count:,} tokens, {layer.experts} experts, share of each "
        + " ".join(f"{share:.1%}" for share in layer["tokens"] / max(layer["tokens"].sum(), 1))
        for layer in statistics.layers
    ]
    payload = {
        "model_sha256": statistics.model_sha256,
        "layers": [
            {"name": layer.name, "token_count": layer.token_count, "keys": sorted(layer.sums)}
            | {key: values.tolist() for key, values in layer.sums.items() if values.ndim == 1}
            for layer in statistics.layers
        ],
    }
    return "\n".join(lines), payload
