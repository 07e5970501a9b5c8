from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from runtime.text.sampling import Sampling
from runtime.text.tokenizer import Tokenizer
from runtime.text.writing import Writing, before_stop, begun
from tests.decoders import save_tokenizer

LETTERS = sorted(ByteLevel.alphabet())


@pytest.fixture
def words(tmp_path):
    save_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path)


@pytest.fixture
def spelling(tmp_path):
    """A tokenizer with a token a byte."""
    library = Library(WordLevel({letter: index for index, letter in enumerate(LETTERS)}, unk_token="!"))
    library.decoder = Bytes()
    library.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.load(tmp_path)


def spelled(text):
    ((letters, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [LETTERS.index(letter) for letter in letters]


def written(tokenizer, ids, **sampling):
    """The answer, and the piece after every token and at the end."""
    writing = Writing(tokenizer, Sampling(**sampling))
    pieces = []
    for token in ids:
        writing.add(token)
        pieces.append(writing.piece())
    return writing, [*pieces, writing.piece(last=True)]


def test_pieces_are_the_text_without_special_tokens(words):
    assert written(words, [5, 2, 77])[1] == ["w5", "", " w77", ""]


def test_a_character_of_several_tokens_comes_whole(spelling):
    assert written(spelling, spelled("aé"))[1] == ["a", "", "é", ""]


def test_half_a_character_is_shown_where_nothing_follows(spelling):
    assert written(spelling, spelled("aé")[:2])[1] == ["a", "", "\ufffd"]


def test_a_stop_string_over_several_tokens_ends_the_answer_and_is_never_shown(spelling):
    writing, pieces = written(spelling, spelled("on, END. more"), stop_strings=("END.",))
    assert (writing.text, writing.tokens, writing.ended) == ("on, ", spelled("on, END."), True)
    assert pieces == ["o", "n", ",", " ", *[""] * 10]


def test_a_stop_string_within_a_token_cuts_its_text(words):
    writing, pieces = written(words, [5, 77, 8], stop_strings=("77",))
    assert (writing.text, writing.tokens, pieces) == ("w5 w", [5, 77], ["w5", " w", "", ""])


def test_what_only_began_a_stop_string_comes_late(spelling):
    writing, pieces = written(spelling, spelled("ENTER"), stop_strings=("END.", "R!"))
    assert not writing.ended
    assert pieces == ["", "", "ENT", "", "E", "R"]


def test_a_stop_id_ends_an_answer_too(words):
    writing, pieces = written(words, [5, 2, 77], stop=(2,), stop_strings=("w77",))
    assert (writing.text, writing.tokens, writing.ended) == ("w5", [5, 2], True)
    assert pieces == ["w5", "", "", ""]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_held_back_is_enough_and_no_more(text, stops):
    certain = [text[: end - begun(text[:end], stops)] for end in range(len(text) + 1) if not cut(text[:end], stops)]
    assert all(after.startswith(before) for before, after in pairwise(certain))
    assert all(before_stop(text, stops).startswith(shown) for shown in certain)
    for end, shown in enumerate(certain):
        rest = text[len(shown) : end]
        assert not rest or any(stop.startswith(rest) for stop in stops)


def cut(text, stops):
    return before_stop(text, stops) != text
