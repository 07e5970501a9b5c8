import datetime
import json
import re

import pytest

from moe_spec.errors import UserError
from runtime.text.chat import render
from runtime.text.tokenizer import Tokenizer
from tests.decoders import save_tokenizer

AGAIN = "copy the tokenizer's files of the checkpoint beside the model again"
MEND = "leave out --chat and write the prompt as the model wants it, or mend the template"


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


def test_of_several_templates_the_default_one_is_taken(directory):
    (directory / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "w7"}, {"name": "default", "template": "w8 {{ messages[0].content }}"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(directory).encode_chat("w5") == [8, 5]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    with refused(f"{directory} has no chat_template.jinja, so the model knows no chat", "leave out --chat"):
        Tokenizer.load(directory).encode_chat("w5")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("w8{% generation %} w9 {% endgeneration %}w10", "w8 w9 w10"),
        ("{% for n in range(5, 9) %}{% if n == 7 %}{% break %}{% endif %}w{{ n }} {% endfor %}", "w5 w6 "),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a & <b> é"}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{{ tools is none }} {{ documents is none }} {{ bos_token }}", "True True <s>"),
    ],
)
def test_a_template_has_what_transformers_gives_it(template, text, tmp_path):
    assert render(template, [{"role": "user", "content": "a & <b> é"}], {"bos_token": "<s>"}, tmp_path) == text


def test_a_template_is_told_the_day(tmp_path):
    before = datetime.datetime.now().astimezone().strftime("%Y-%m-%d")
    assert before <= render("{{ strftime_now('%Y-%m-%d') }}", [], {}, tmp_path) <= "9999"


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
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(999999) }}", "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
        ("{{ strftime_now.__globals__.os }}", "access to attribute '__globals__' of 'function' object is unsafe."),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe."),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_named(template, reason, directory):
    (directory / "chat_template.jinja").write_text(template)
    with refused(f"the chat template of {directory} fails: {reason}", MEND):
        Tokenizer.load(directory).encode_chat("w5")
