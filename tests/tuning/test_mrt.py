"""MRT's groups of editors, and where those of its released code stand in LLaVA v1's prompt."""

import functools

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from moresjax.core.errors import UserError
from moresjax.core.layout import LAYOUT_FIELDS, TokenLayout
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.data.templates import get_template
from moresjax.tuning.base import Edit
from moresjax.tuning.methods.reft import LoReFT
from moresjax.tuning.selectors import parse_selector
from moresjax.tuning.spec import parse_spec

# The constants of the released code: tokens that are not the question's (an image counts as one),
# what an image adds to that, the first token that is edited, and the tokens of the window.
SPECIAL, IMAGE_EXTRA, EOS, FIRST = 38, 255, 1, 293
VISUAL, LENGTH = 256, 480  # one length: nothing is compiled twice
PHOTO = np.zeros((14, 14, 3), np.uint8)
# LLaMA's pieces of the system prompt and the roles, as its tokenizer cuts them.
PIECES = """
▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The ▁gives
▁helpful , ▁detailed ▁pol ite ▁answers ▁to ▁the ' s ▁questions ▁US ER : ▁ SS IST ANT ▁is what ▁what
▁cat ▁on ▁mat ? ▁?
"""
# What LLaMA's own vocabulary and merges make of a prompt, before and behind its image: as the
# package `llama-tokenizer-js` 1.2.2 of npm, which has both, cuts it.
OF_LLAMA = (
    """
<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The
▁assistant ▁gives ▁helpful , ▁detailed , ▁and ▁pol ite ▁answers ▁to ▁the ▁user ' s ▁questions . ▁US
ER : ▁
""",
    "▁ <0x0A> what ▁is ▁on ▁the ▁mat ▁? ▁A SS IST ANT :",
)


@functools.cache
def llama_like() -> PreTrainedTokenizerFast:
    """A blank before every text, bytes for what is unknown, BOS: LLaMA's tokenizer in small."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = [(token, 0.0) for token in special] + [(p, -1.0) for p in PIECES.split()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def row_of(*turns: Turn):
    template = get_template("vicuna_v1")
    return Processor(llama_like(), template, ImageProcessor(14), VISUAL).row(
        Sample("a", turns, (PHOTO,))
    )


def asked(words: int, answer: str | None = None) -> Turn:
    return Turn(f"{IMAGE_MARK}\n{' '.join(['what'] * words)}", answer)


def positions(spec: str, row) -> list[list[int]]:
    """The tokens that the editors of the text take, prefix first."""
    row = row.pad(LENGTH)
    layout = TokenLayout.stacked({name: getattr(row, name)[None] for name in LAYOUT_FIELDS}, VISUAL)
    editors = [m for m in parse_spec(spec) if isinstance(m, LoReFT) and m.site == "llm.block.out"]
    masks = [np.asarray(parse_selector(editor.positions)(layout))[0] for editor in editors]
    return [np.flatnonzero(mask).tolist() for mask in masks]


def released(length: int, n: int) -> list[list[int]]:
    """What the released code edits of a row of `length` tokens, visual ones included."""
    placeholders = length - IMAGE_EXTRA
    text = placeholders - SPECIAL - EOS
    size = n if text >= 2 * n else text // 2
    end = placeholders + IMAGE_EXTRA - 1 - 1
    return [[*range(FIRST, FIRST + size)], [*range(end - size + 1, end + 1)]]


def test_the_prompt_is_that_of_the_constants():
    row = row_of(asked(5))
    tokens = llama_like().convert_ids_to_tokens(row.tokens.tolist())
    assert np.flatnonzero(row.image >= 0).tolist() == [*range(35, 35 + VISUAL)]
    assert tokens[FIRST - 2 : FIRST + 2] == ["▁", "<0x0A>", "what", "▁what"]
    assert FIRST == SPECIAL + IMAGE_EXTRA
    assert tokens[-1] == ":"


def test_the_prompt_is_cut_as_llamas_own_tokenizer_cuts_it():
    row = row_of(Turn(f"{IMAGE_MARK}\nwhat is on the mat ?"))
    tokens = np.asarray(llama_like().convert_ids_to_tokens(row.tokens.tolist()))
    before, behind = (text.split() for text in OF_LLAMA)
    assert tokens[:35].tolist() == before
    assert tokens[35 + VISUAL :].tolist() == behind
    # The prefix begins behind the blank and the newline, the suffix ends before the last token.
    prefix, suffix = positions("mrt-code:length=4", row)
    assert tokens[prefix].tolist() == behind[2:6]
    assert tokens[suffix].tolist() == behind[-5:-1]
    assert prefix[0] == FIRST


ANSWERS = (None, "cat", "a cat on a mat")
TALKS: list[tuple[Turn, ...]] = [
    (asked(words, answer),) for words in (1, 2, 5, 30) for answer in ANSWERS
]
TALKS.append((asked(3, "cat"), Turn("what is on the mat ?", "a cat"), Turn("what ?", "a mat")))
TALKS.append((asked(3, "cat"), Turn("what is on the mat ?")))


@pytest.mark.parametrize("turns", TALKS, ids=range(len(TALKS)))
def test_editors_stand_where_those_of_the_released_code_do(turns):
    row = row_of(*turns)
    assert positions("mrt-code", row) == released(len(row), 6)
    assert positions("mrt-code:length=4", row) == released(len(row), 4)


def test_a_question_alone_is_what_the_paper_edits():
    row = row_of(asked(30, "cat"))
    prefix, suffix = positions("mrt-paper", row)
    # From the blank before the newline to the end of " ASSISTANT:".
    assert prefix == [291, 292, 293, 294]
    assert llama_like().convert_ids_to_tokens(row.tokens.tolist())[suffix[-1]] == ":"
    assert positions("mrt:skip=2;0", row)[0] == [293, 294, 295, 296]
    assert positions("mrt:text=all,skip=2;1", row) == [[*range(293, suffix[-1])]]
    assert positions("mrt:text=all", row) == [[*range(291, suffix[-1] + 1)]]


SITES = {"visual": "vision.block.out", "connector": "connector.out"}
SITES |= dict.fromkeys(("prefix", "suffix"), "llm.block.out")


@pytest.mark.parametrize(
    "groups", ["visual", "suffix", "connector;prefix", "suffix;prefix;visual", ";".join(SITES)]
)
def test_groups_may_be_left_out(groups):
    every = dict(zip(SITES, parse_spec("mrt-paper"), strict=True))
    expected = tuple(editor for name, editor in every.items() if name in groups.split(";"))
    assert parse_spec(f"mrt:groups={groups}") == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mrt:groups=vision", r"group of mrt:groups 'vision'; choose from: visual, connector"),
        ("mrt:groups=", r"group of mrt:groups ''"),
        ("mrt:groups=prefix;prefix", r"names a group twice"),
        ("mrt:groups=prefix,text=all", r"name both prefix and suffix, or neither"),
        ("mrt:text=some", r"mrt:text 'some'; choose from: ends, all"),
        ("mrt:skip=2", r"two whole numbers as in skip=2;1, got '2'"),
        ("loreft:positions=question:skip(2)", r"slice in selector .* 'skip\(2\)'"),
        ("loreft:positions=question:skip(1;1)+skip(1;1)", r"slice in selector"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(spec, message):
    def build():
        for method in parse_spec(spec):
            assert isinstance(method, Edit)
            parse_selector(method.positions)

    with pytest.raises(UserError, match=message):
        build()
