"""`token(WORD)`: words become token ids where a tokenizer is known."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.data.processor import Processor, word_ids
from moresjax.data.templates import get_template
from moresjax.inference.model import Model
from moresjax.runs.build import build_model
from moresjax.runs.config import load_config
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_model

DIGITS = Path(__file__).parents[2] / "configs" / "digits.py"
SPEC = "loreft:rank=1,positions=token(seven)|token(how),layers=2"


def tokenizer_with_spaces() -> PreTrainedTokenizerFast:
    """Byte-level, as GPT-2's and Phi's: a word is another token after a space."""
    vocabulary = {"<unk>": 0, "cat": 1, "Ġcat": 2, "c": 3, "a": 4, "t": 5, "Ġ": 6, "s": 7}
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    backend = Tokenizer(models.BPE(vocabulary | {"ca": 8}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def hidden(model, batch) -> np.ndarray:
    return np.asarray(jax.jit(lambda: model(batch).hidden)())


def test_a_word_is_every_token_that_spells_it():
    assert word_ids(tokenizer_with_spaces(), "cat") == (1, 2)
    assert word_ids(build_tokenizer(), "seven") == (build_tokenizer().get_vocab()["seven"],)
    with pytest.raises(UserError, match=r"token\(cats\).*no single token for 'cats'"):
        word_ids(tokenizer_with_spaces(), "cats")
    with pytest.raises(UserError, match="'elephant'"):
        word_ids(build_tokenizer(), "elephant")


def test_an_attached_selector_finds_the_words_of_the_batch():
    tokenizer = build_tokenizer()
    processor = Processor(tokenizer, get_template("bare"), None, 9)
    batch = tiny_batch(images=0)
    # The tiny model has fewer words than the tokenizer; the edit is all that is looked at.
    tokens = np.ones_like(batch.tokens)
    tokens[0, 3], tokens[1, 5] = (tokenizer.get_vocab()[w] for w in ("seven", "how"))
    model = Model(tiny_model(vocab_size=64), processor)
    batch = type(batch)(tokens, batch.layout)
    base = hidden(model.mllm, batch)
    model.attach(SPEC)
    changed = np.abs(hidden(model.mllm, batch) - base).max(-1) > 1e-4
    assert np.argwhere(changed).tolist() == [[0, 3], [1, 5]]
    with pytest.raises(UserError, match="'elephant'"):
        model.attach("loreft:positions=token(elephant)")


def test_a_run_knows_the_words_and_a_model_without_tokenizer_says_so():
    sizes = [f"model.llm.{key}_size=8" for key in ("hidden", "intermediate")]
    init = [f"init.{part}=random" for part in ("llm", "vision", "connector")]
    settings = [*sizes, "model.llm.num_heads=2", f"tuning={SPEC}", *init]
    config = load_config(str(DIGITS), settings)
    words = dict(build_model(config).tuning.words)
    assert words == {w: (build_tokenizer().get_vocab()[w],) for w in ("seven", "how")}
    with pytest.raises(UserError, match="needs the batch's tokens and a tokenizer"):
        tiny_model(SPEC)(tiny_batch())
