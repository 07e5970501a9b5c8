"""Text of three domains as blocks of token ids: a novel, speeches, and program code with its documentation."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.tasks.sources import MOBY_DICK, NETWORKX, STATE_OF_THE_UNION, Package
from moe_spec.dataset import load_dataset

DOMAINS: Mapping[str, Package] = {"novel": MOBY_DICK, "speeches": STATE_OF_THE_UNION, "code": NETWORKX}
"""Where the text of each domain comes from: one file a chapter, a speech, a module."""

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class CorpusRecipe:
    """What the blocks of a domain depend on, beside its text.

    Attributes:
        vocabulary: tokens of the byte-pair encoding.
        tokenizer_characters: of each domain that it learns from: as many of each.
        block: tokens a block, S.
        held_out: every so-many-th document is for testing.
        train_blocks: of each domain at most, drawn at random.
        calibration_blocks: of each domain, out of those for training.
        test_blocks: of each domain at most, drawn at random.
        version: raised when the code below makes something else of the same numbers.
    """

    vocabulary: int = 2048
    tokenizer_characters: int = 1_000_000
    block: int = 128
    held_out: int = 10
    train_blocks: int = 4096
    calibration_blocks: int = 128
    test_blocks: int = 192
    version: int = 1


def read_documents(directory: Path) -> list[str]:
    """Texts and modules below ``directory``, in the order of their names; those that are empty left out."""
    paths = sorted(path for path in directory.rglob("*.*") if path.suffix in (".txt", ".py"))
    return [text for text in (path.read_text(encoding="utf-8") for path in paths) if text.strip()]


def split_documents(documents: Sequence[str], held_out: int) -> tuple[list[str], list[str]]:
    """Documents to train with, and every ``held_out``-th for testing.

    >>> split_documents("abcdefg", held_out=3)
    (['a', 'b', 'd', 'e', 'g'], ['c', 'f'])
    """
    test = list(documents[held_out - 1 :: held_out])
    return [document for index, document in enumerate(documents, start=1) if index % held_out], test


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level byte-pair encoding, which knows every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def to_blocks(tokenizer: Tokenizer, documents: Sequence[str], length: int) -> npt.NDArray[np.int64]:
    """Every document cut into whole blocks of S tokens, (N, S) ids.

    What is left of a document is dropped, so nothing is padded and no block holds two documents.
    """
    encoded = [np.asarray(encoding.ids, np.int64) for encoding in tokenizer.encode_batch(list(documents))]
    cut = [ids[: len(ids) // length * length].reshape(-1, length) for ids in encoded]
    return np.concatenate(cut)


def write_corpus(directory: Path, texts: Mapping[str, Sequence[str]], recipe: CorpusRecipe) -> None:
    """Write tokenizer.json, and for every domain ``DOMAIN/{finetune,calibration,test}.npz``.

    Args:
        directory: exists.
        texts: documents of every domain.
        recipe: how.
    """
    train = [split_documents(documents, recipe.held_out)[0] for documents in texts.values()]
    sample = ["\n".join(documents)[: recipe.tokenizer_characters] for documents in train]
    tokenizer = train_tokenizer(sample, recipe.vocabulary)
    tokenizer.save(str(directory / TOKENIZER))
    write_blocks(directory, texts, tokenizer, recipe)


def write_blocks(
    directory: Path, texts: Mapping[str, Sequence[str]], tokenizer: Tokenizer, recipe: CorpusRecipe
) -> None:
    """What ``write_corpus`` writes for every domain, in the tokens of a given ``tokenizer``."""
    for domain, documents in texts.items():
        train, test = split_documents(documents, recipe.held_out)
        train_NS = _draw(to_blocks(tokenizer, train, recipe.block), recipe.train_blocks)
        test_NS = _draw(to_blocks(tokenizer, test, recipe.block), recipe.test_blocks)
        (directory / domain).mkdir()
        save_blocks(directory / domain / "finetune.npz", train_NS)
        save_blocks(directory / domain / "calibration.npz", train_NS[: recipe.calibration_blocks])
        save_blocks(directory / domain / "test.npz", test_NS)


def _draw(blocks_NS: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """``count`` of the blocks, or all of them, in random order."""
    return np.random.default_rng(0).permutation(blocks_NS)[:count]


def save_blocks(path: Path, blocks_NS: npt.NDArray[np.int64]) -> None:
    """Task data as ``moe-edge calibrate`` takes it."""
    np.savez_compressed(path, input_ids=blocks_NS, attention_mask=np.ones_like(blocks_NS))


def read_blocks(path: Path) -> npt.NDArray[np.int64]:
    """(N, S) ids of what ``save_blocks`` wrote.

    Raises:
        UserError: no readable .npz.
    """
    ids_NS: npt.NDArray[np.int64] = load_dataset(path).feeds["input_ids"]
    return ids_NS
