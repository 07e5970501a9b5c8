"""config.json beside an ONNX file: somebody else wrote it."""

import re

import pytest

from graph_passes.optimize import optimize
from moe_spec.errors import UserError
from tests.graph_passes.block_models import Spec, save
from tests.heard import Heard
from tests.zoo import RUNNER


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'{"num_experts": 8', r"is no complete JSON: Expecting ',' delimiter: line 1 column 18 \(char 17\)"),
        (b"[8]", "holds a list, expected a JSON object"),
        (b'{"name": "\xff"}', "is no complete JSON: 'utf-8' codec can't decode byte 0xff .*"),
    ],
    ids=["cut", "a list", "no text"],
)
def test_one_that_is_none_is_refused_before_any_work(tmp_path, text, what):
    save(Spec(), tmp_path / "block.onnx")
    (tmp_path / "config.json").write_bytes(text)
    heard = Heard()
    with pytest.raises(UserError) as error:
        optimize(tmp_path / "block.onnx", tmp_path / "out", RUNNER, form="dense", on_progress=heard)
    assert re.fullmatch(f"{re.escape(str(tmp_path / 'config.json'))} {what}", error.value.what)
    assert error.value.hint == "mend it, or remove it"
    assert heard.to_the_end() == []
    assert not (tmp_path / "out").exists()
