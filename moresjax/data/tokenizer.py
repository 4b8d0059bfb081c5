"""Training a tokenizer on texts of one's own."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moresjax.core.errors import UserError, choice_error
from moresjax.core.types import Tokenizer
from moresjax.data.llava import LlavaSource
from moresjax.data.samples import IMAGE_MARK

ALGORITHMS = ("bpe", "unigram")
# Padding, beginning and end of a text, and the mark of an image that exported models store.
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_MARK)
BYTES = 256


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    algorithm: str = "bpe",
    add_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Trains a tokenizer of subwords over bytes, of the class that `transformers` loads.

    Every text can be written with it, for all 256 bytes are tokens; none is unknown. A text begins
    with `<s>`, as those of LLaMA do. Two trainings on the same texts give the same `bpe`;
    `unigram` may number its tokens otherwise.

    >>> texts = ["a red cube", "a red ball", "a blue cube"]
    >>> tokenizer = train_tokenizer(texts, 280)
    >>> tokenizer.decode(tokenizer("a red cube").input_ids)
    '<s>a red cube'
    >>> len(tokenizer)
    274

    Args:
      texts: The texts to train on.
      vocab_size: The largest number of tokens; few texts give fewer.
      algorithm: `bpe` (byte-pair encoding) or `unigram`.
      add_tokens: Further control tokens, such as those of a chat template.

    Raises:
      UserError: The algorithm is unknown, there is no text, or the vocabulary has no room for the
        bytes and the control tokens.
    """
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys([*SPECIAL, *add_tokens]))
    if algorithm not in ALGORITHMS:
        raise choice_error("algorithm", algorithm, ALGORITHMS)
    if vocab_size < BYTES + len(special):
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is too small: {BYTES} bytes and {len(special)} "
            f"control tokens come first"
        )
    iterator = iter(texts)
    first = next(iterator, None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {
        "vocab_size": vocab_size,
        "special_tokens": special,
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    bpe = algorithm == "bpe"
    backend = BackendTokenizer(models.BPE() if bpe else models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(**options) if bpe else trainers.UnigramTrainer(**options)
    backend.train_from_iterator(itertools.chain((first,), iterator), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=[t for t in special if t not in ("<pad>", "<s>", "</s>")],
        clean_up_tokenization_spaces=False,
    )


def read_texts(files: str) -> Iterator[str]:
    """The texts of files: every line of a text file, every turn of LLaVA JSON.

    Answers follow their questions after a blank, as templates write them: ` no` is a word then.

    Args:
      files: Paths joined by `;`; those that end in `.txt` are texts.

    Raises:
      UserError: A file is missing or is neither, or a record of it is no conversation.
    """
    for path in map(Path, files.split(";")):
        if path.suffix == ".txt":
            yield from _lines(path)
            continue
        source = LlavaSource(str(path))
        for number in range(len(source)):
            for turn in source[number].turns:
                text = " ".join(filter(None, (turn.question, turn.answer)))
                yield text.replace(IMAGE_MARK, "")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from (line for line in map(str.rstrip, file) if line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
