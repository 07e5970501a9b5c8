import re

import pytest

from moe_spec.errors import UserError
from runtime.text.tokenizer import Tokenizer
from tests.decoders import save_tokenizer

AGAIN = "copy the tokenizer's files of the checkpoint beside the model again"


@pytest.fixture
def directory(tmp_path):
    save_tokenizer(tmp_path)
    return tmp_path


def refused(what, hint=AGAIN):
    return pytest.raises(UserError, match=f"^{re.escape(what)}\nhint: {re.escape(hint)}$")


def test_text_becomes_tokens_and_text_again(directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("w5 w77 nothing") == [5, 77, 3]
    assert tokenizer.decode([1, 5, 77, 2]) == "w5 w77"


def test_a_chat_is_written_as_the_template_has_it(directory):
    assert Tokenizer.load(directory).encode_chat("w5 w77") == [1, 5, 77, 9]


def test_a_template_may_stand_in_the_configuration(directory):
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text('{"chat_template": "w8 {{ messages[0].content }}"}')
    assert Tokenizer.load(directory).encode_chat("w5") == [8, 5]


def test_a_model_without_a_tokenizer_reads_no_text(tmp_path):
    with refused(f"{tmp_path} has no tokenizer.json, so no text can be read or written"):
        Tokenizer.load(tmp_path)


def test_a_broken_tokenizer_is_named(directory):
    (directory / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=f"^{directory}/tokenizer.json is no tokenizer: .*\nhint: {AGAIN}$"):
        Tokenizer.load(directory)


def test_no_template_no_chat(directory):
    (directory / "chat_template.jinja").unlink()
    with refused(f"{directory} has no chat_template.jinja, so the model knows no chat", "leave out --chat"):
        Tokenizer.load(directory).encode_chat("w5")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
        ("{{ raise_exception('only w4') }}", "only w4"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe."),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_named(template, reason, directory):
    (directory / "chat_template.jinja").write_text(template)
    with refused(f"the chat template of {directory} fails: {reason}"):
        Tokenizer.load(directory).encode_chat("w5")
