import json

import pytest

from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import BlockEntry, Manifest, PassEntry, TensorSpec, list_files
from moe_spec.plan import PruningPlan

REMAKE = "make the directory again with the command that made it"


@pytest.fixture
def model_dir(tmp_path):
    """A model directory with its manifest."""
    directory = tmp_path / "model"
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "model.onnx").write_text("graph")
    (directory / "tokenizer" / "vocab.txt").write_text("words")
    manifest(directory).save(directory)
    return directory


def manifest(directory):
    return Manifest(
        kind="optimized",
        source_sha256="source",
        parent_sha256="parent",
        files=list_files(directory),
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(TensorSpec("logits", "float32", ("batch", "sequence", 128)),),
        blocks=(
            BlockEntry("layers.0.mlp", 2, 1, (3, 5), "softmax", "dense", 64, gates="gates_0", scores="scores_0"),
            BlockEntry("layers.1.mlp", 1, 1, (4,), "", "ffn", 32),
        ),
        plan=PruningPlan("source", "reap", (LayerPlan("layers.0.mlp", 8, 1, (3, 5)),)),
        passes=(PassEntry("prune", True, 90, 60, 4096, 1024),),
        tools={"onnx": "1.23"},
        details={"oracle": [{"max_rel": 1e-7}]},
    )


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    return caught.value.what, caught.value.hint


def test_what_is_saved_is_loaded_again(model_dir):
    assert Manifest.load(model_dir) == manifest(model_dir)


def test_it_lists_every_file_but_itself(model_dir):
    assert [entry.name for entry in list_files(model_dir)] == ["model.onnx", "tokenizer/vocab.txt"]
    Manifest.load(model_dir).check_files(model_dir)


def test_a_directory_that_changed_is_refused(model_dir):
    path = model_dir / "model.onnx"
    loaded = Manifest.load(model_dir)
    path.write_text("grapH")
    what = f"{path} is not the file that manifest.json describes (sha256 differs)"
    assert refusal(lambda: loaded.check_files(model_dir)) == (what, REMAKE)
    path.write_text("gra")
    what = f"{path} has 3 bytes, manifest.json says 5"
    assert refusal(lambda: loaded.check_files(model_dir)) == (what, REMAKE)
    path.unlink()
    what = f"{path} is missing, manifest.json lists it"
    assert refusal(lambda: loaded.check_files(model_dir)) == (what, REMAKE)


def test_a_manifest_names_no_file_outside_its_directory(model_dir):
    path = model_dir / "manifest.json"
    path.write_text(path.read_text().replace("tokenizer/vocab.txt", "../../etc/passwd"))
    what, _ = refusal(lambda: Manifest.load(model_dir).check_files(model_dir))
    assert what == f"{path} names the file '../../etc/passwd', which lies outside {model_dir}"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"kind": None}, "key 'kind' holds None, expected str"),
        ({"files": [{"name": "model.onnx"}]}, "files[0]: key 'sha256' is missing"),
        ({"blocks": [{"name": "mlp", "experts": "2"}]}, "blocks[0]: key 'experts' holds '2', expected int"),
        ({"plan": {"criterion": "reap", "layers": []}}, "plan: key 'model_sha256' is missing"),
    ],
)
def test_a_spoilt_manifest_is_refused(change, what, model_dir):
    path = model_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert refusal(lambda: Manifest.load(model_dir)) == (f"{path}: {what}", REMAKE)


def test_a_missing_manifest_is_refused(tmp_path):
    what = f"{tmp_path / 'manifest.json'} does not exist, expected a manifest (JSON)"
    assert refusal(lambda: Manifest.load(tmp_path)) == (what, "check the path")
