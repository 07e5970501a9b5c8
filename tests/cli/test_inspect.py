import dataclasses
import json
import shutil

import numpy as np
import onnx.parser
import pytest

from graph_passes.optimize import optimize
from moe_spec.identity import checkpoint_sha256, onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from moe_spec.record import save_record
from moe_spec.statistics import KEYS, LayerStatistics, Statistics
from runtime.backend import BuildOptions
from runtime.bench import BenchRow
from runtime.bench_report import BenchReport
from runtime.build import build
from runtime.targets import find_target
from runtime.verification.report import SCHEMA
from runtime.verify import verify
from tests.cli.helpers import invoke, leftovers
from tests.graph_passes.block_models import NAME, Spec, plan, save
from tests.zoo import RUNNER

LAYERS = ("layers.1.mlp", "layers.3.mlp")
KEEP = (0, 2, 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One MoE layer as a foreign file, and all that moe-edge makes of it."""
    root = tmp_path_factory.mktemp("made")
    save(Spec(), root / "block.onnx")
    keep = plan(Spec(), KEEP, onnx_sha256(root / "block.onnx"))
    keep.save(root / "plan.json")
    optimize(root / "block.onnx", root / "optimized", RUNNER, plan=keep, form="dense")
    build(root / "optimized", find_target("cpu"), BuildOptions(), root / "engine")
    verify(root / "engine", root / "optimized").save(root / "parity.json")
    return root


def described(path):
    """What inspect says of ``path``, and the same for machines."""
    code, stdout, stderr = invoke("inspect", path)
    assert (code, stderr) == (0, "")
    return stdout, json.loads(invoke("inspect", path, "--json")[1])


def test_a_checkpoint(zoo):
    checkpoint = zoo.checkpoint("vmoe")
    text, payload = described(checkpoint)
    identity = checkpoint_sha256(checkpoint)
    rows = "".join(f"  {name}: 8 experts, K=2, VMoeRouter\n" for name in LAYERS)
    assert text == f"{checkpoint}: checkpoint {identity[:12]}, 2 MoE layers\n{rows}"
    assert payload["sha256"] == identity
    assert payload["layers"][1] == {
        "name": "layers.3.mlp",
        "experts": 8,
        "top_k": 2,
        "router": "VMoeRouter",
        "groups": None,
    }


def test_an_exported_directory(zoo):
    directory = zoo.exported("vmoe")
    text, payload = described(directory)
    size = f"{Manifest.load(directory).blocks[0].bytes:,}"
    rows = [f"  {name}: 8 experts, K=2, softmax, top-k; form experts, {size} bytes\n" for name in LAYERS]
    assert text == f"{directory / 'model.onnx'}: {payload['nodes']} nodes, 2 MoE layers\n{''.join(rows)}"
    assert [block["name"] for block in payload["blocks"]] == list(LAYERS)
    assert payload["source_sha256"] == checkpoint_sha256(zoo.checkpoint("vmoe"))
    assert described(directory / "manifest.json") == (text, payload)


def test_groups_and_biases_of_a_router(zoo):
    text, _ = described(zoo.exported("deepseek_v3"))
    assert "K=2, sigmoid, selection bias, 1 of 2 groups, top-k, renormalised; form experts" in text


def test_a_foreign_file(made):
    text, payload = described(made / "block.onnx")
    size = 4 * (8 * 8 + 3 * 8 * 8 * 12)
    assert text == (
        f"{made / 'block.onnx'}: {payload['nodes']} nodes, 1 MoE layers\n"
        f"  {NAME}: 8 experts, K=2, softmax, top-k; form experts, {size:,} bytes\n"
    )
    assert payload["blocks"][0]["activation"] == {"kind": "silu", "alpha": 1.0, "limit": 0.0, "up_offset": 0.0}
    assert (payload["unrecognised"], payload["source_sha256"]) == ([], onnx_sha256(made / "block.onnx"))


def test_an_optimised_directory(made):
    text, payload = described(made / "optimized")
    assert text.endswith(f"  {NAME}: 3 experts, K=2, softmax, top-k; form dense, {4 * 3 * (8 + 3 * 8 * 12):,} bytes\n")
    assert (payload["blocks"][0]["keep"], payload["unrecognised"]) == (list(KEEP), [])


def test_an_engine(made):
    text, payload = described(made / "engine")
    size = sum(entry.bytes for entry in Manifest.load(made / "engine").files)
    assert text.splitlines()[:4] == [
        f"{made / 'engine'}: engine, {size:,} bytes",
        "  backend: onnxruntime",
        "  provider: CPUExecutionProvider",
        "  target: onnxruntime-cpu",
    ]
    assert payload == json.loads(json.dumps(Manifest.load(made / "engine").to_json()))


def test_a_plan(made):
    text, payload = described(made / "plan.json")
    identity = onnx_sha256(made / "block.onnx")
    assert text == (
        f"{made / 'plan.json'}: plan by hand for model {identity[:12]}\n  {NAME}: keeps 3 of 8, K=2: [0, 2, 5]\n"
    )
    assert payload["layers"][0]["keep"] == list(KEEP)


def test_a_plan_that_keeps_the_router_full_and_what_it_makes(made, tmp_path):
    plan = PruningPlan.load(made / "plan.json")
    full = tuple(dataclasses.replace(layer, router="full") for layer in plan.layers)
    dataclasses.replace(plan, layers=full).save(tmp_path / "plan.json")
    assert described(tmp_path / "plan.json")[0].endswith(f"  {NAME}: keeps 3 of 8, K=2, router full: [0, 2, 5]\n")
    optimize(made / "block.onnx", tmp_path / "out", RUNNER, plan=PruningPlan.load(tmp_path / "plan.json"))
    text, payload = described(tmp_path / "out")
    assert f"  {NAME}: 3 experts, K=2, softmax, top-k, 3 of 8 rows lead to an expert; form sorted, " in text
    assert payload["blocks"][0]["router"] == "softmax, top-k, 3 of 8 rows lead to an expert"
    assert Manifest.load(tmp_path / "out").blocks[0].router == "softmax, top-k, 3 of 8 rows lead to an expert"


def test_a_parity_report_says_what_verify_said(made, tmp_path):
    text, payload = described(made / "parity.json")
    assert text.startswith(f"{made / 'parity.json'}: PASS: {payload['examples']} examples of random feeds at ")
    assert len(text.splitlines()) == 1 + len(payload["outputs"]) + len(payload["notes"])
    failed = payload | {"passed": False, "reasons": ["out differs"], "artifact": "parity", "schema": SCHEMA}
    (tmp_path / "failed.json").write_text(json.dumps(failed))
    assert described(tmp_path / "failed.json")[0].splitlines()[-2:] == [
        "  out differs",
        "  the routers of all layers agree",
    ]


def test_a_report_of_cost(tmp_path):
    row = BenchRow("small", 8, "", 1.25, 1.5, 2.0, 6400.0, None, 3.0, 1 << 20, 12345)
    BenchReport((row,), {}, "a machine").save(tmp_path / "bench.json")
    assert described(tmp_path / "bench.json")[0] == (
        f"{tmp_path / 'bench.json'}: a machine\n  small: 1.250 ms for 8 examples, 1.0 MiB RAM, 12,345 bytes\n"
    )


def test_a_fine_tuning(tmp_path):
    record = {
        "method": "seer", "model_sha256": "m" * 64, "data_sha256": "d" * 64, "teacher_sha256": None, "losses": [1.5],
        "options": {"top_k": 1}, "recipe": {"steps": 60, "warmup": None},
    }  # fmt: skip
    save_record(tmp_path / "finetuning.json", "finetuning", 1, record)
    text, payload = described(tmp_path / "finetuning.json")
    assert text == f"{tmp_path / 'finetuning.json'}: seer fine-tuning of model mmmmmmmmmmmm\n  top_k: 1\n  steps: 60\n"
    assert payload["recipe"] == record["recipe"]


def test_brackets_without_end_are_an_error(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    code, out, err = invoke("inspect", tmp_path / "deep.json")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'deep.json'} is no complete JSON: ")
    assert err.endswith(f"\nhint: {KNOWN}\n")


def test_a_name_that_no_disk_takes_is_an_error():
    code, _, err = invoke("inspect", "n" * 300)
    assert (code, err.startswith("error: nnn")) == (1, True)


def test_what_is_no_number_is_null_for_machines(tmp_path):
    row = BenchRow("small", 8, "", 1.25, 1.5, 2.0, 6400.0, None, 3.0, 1 << 20, 12345)
    BenchReport((row,), {}, "a machine").save(tmp_path / "bench.json")
    text = (tmp_path / "bench.json").read_text()
    (tmp_path / "bench.json").write_text(text.replace("6400.0", "NaN"))
    assert described(tmp_path / "bench.json")[1]["rows"][0]["examples_per_second"] is None


def test_statistics(tmp_path):
    path = tmp_path / "statistics.safetensors"
    sums = {key: np.array([3.0, 1.0, 0.0, 4.0]) for key, row in KEYS.items() if row.axes == "E"}
    sums |= {key: np.eye(4) for key, row in KEYS.items() if row.axes == "EE"}
    Statistics("m" * 64, ("data",), (LayerStatistics("layers.1.mlp", 4, 2, 4, sums),)).save(path)
    text, payload = described(path)
    assert text == (
        f"{path}: statistics of model {'m' * 12}\n"
        "  layers.1.mlp: 4 tokens, 4 experts, share of each 37.5% 12.5% 0.0% 50.0%\n"
    )
    layer = payload["layers"][0]
    assert layer["tokens"] == [3.0, 1.0, 0.0, 4.0]
    assert layer["keys"] == sorted(sums)
    assert "logit_gram" not in layer  # matrices are for programs


def test_refusals_are_shown(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 20, "moe_edge" : 1]>
    odd (float[tokens, 2] x, int64[tokens, 1] ids, float[tokens, 1] gates) => (float[tokens, 2] y)
    { [experts] y = moe_edge.Experts_odd<activation = "silu", alpha = 1.0, limit = 0.0, up_offset = 0.0, gated = 0,
        interleaved = 0, transposed = 0, biased = 0>(x, ids, gates) }
    """
    path = tmp_path / "odd.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    said, payload = described(path)
    assert said == (
        f"{path}: 1 nodes, 0 MoE layers\n"
        "  not recognised: layer at Experts_odd 'experts':\n"
        "    experts: the node has 3 inputs, expected 5 (at Experts_odd 'experts')\n"
    )
    assert payload["unrecognised"][0]["refusals"][0]["form"] == "experts"


KNOWN = "known artifacts: bench, finetuning, manifest, parity, plan"


@pytest.mark.parametrize(
    ("name", "content", "what", "hint"),
    [
        (
            "nothing",
            None,
            "does not exist, expected a directory or a file that moe-edge makes or reads",
            "check the path",
        ),
        (
            "notes.txt",
            b"notes",
            "is nothing that moe-edge makes or reads",
            "known: a directory, *.onnx, *.json, *.safetensors",
        ),
        ("config.json", b'{"model_type": "mixtral"}', "is no artifact of moe-edge", KNOWN),
        ("list.json", b"[1, 2]", "holds a list, expected a JSON object", KNOWN),
        (
            "latin.json",
            b'{"artifact": "\xe9"}',
            "is no complete JSON: 'utf-8' codec can't decode byte 0xe9 in position 14: invalid continuation byte",
            KNOWN,
        ),
        ("odd.json", b'{"artifact": ["plan"]}', "is no artifact of moe-edge", KNOWN),
        (
            "cut.json",
            b'{"artifact": "pl',
            "is no complete JSON: Unterminated string starting at: line 1 column 14 (char 13)",
            KNOWN,
        ),
        (
            "empty.onnx",
            b"",
            "is no ONNX model: its graph has no node",
            "give a file that torch.onnx, `moe-edge export` or another exporter wrote",
        ),
    ],
)
def test_what_cannot_be_inspected_is_refused(name, content, what, hint, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert invoke("inspect", path) == (1, "", f"error: {path} {what}\nhint: {hint}\n")


def test_an_empty_directory_is_refused(tmp_path):
    assert invoke("inspect", tmp_path) == (
        1,
        "",
        f"error: {tmp_path} has neither manifest.json, model.onnx nor config.json\n"
        "hint: give a checkpoint, or what a verb of moe-edge wrote\n",
    )


def test_a_directory_that_lost_its_graph_is_no_checkpoint(zoo, tmp_path):
    directory = shutil.copytree(zoo.exported("vmoe"), tmp_path / "exported")
    (directory / "model.onnx").unlink()
    assert invoke("inspect", directory) == (
        1,
        "",
        f"error: {directory} is no model directory: it has no model.onnx\nhint: give what export or optimize wrote\n",
    )


def test_looking_changes_nothing(made):
    before = leftovers(made)
    for name in before:
        assert invoke("inspect", made / name)[0] == 0
    assert leftovers(made) == before


def test_a_plan_that_cannot_be_is_refused(made, tmp_path):
    loaded = PruningPlan.load(made / "plan.json")
    layer: LayerPlan = dataclasses.replace(loaded.layers[0], top_k=3)
    dataclasses.replace(loaded, layers=(layer,)).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text().replace('"keep": [0, 2, 5]', '"keep": [0, 5]')
    (tmp_path / "plan.json").write_text(text)
    assert invoke("inspect", tmp_path / "plan.json") == (
        1,
        "",
        f"error: layer {NAME} keeps 2 of 8 experts, but its router selects K=3 a token\n"
        "hint: keep at least 3: --keep 3; or let K shrink with the layer: --clamp-top-k\n",
    )
