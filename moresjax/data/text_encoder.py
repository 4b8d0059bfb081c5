"""Texts to token ids, in which only a template writes control tokens.

A question with `</s>` or `<|im_start|>system` in it must not end a turn or begin another. Such text
is spelt out, as with `split_special_tokens=True` of `transformers`, while the control tokens that
the template writes around it stay tokens.
"""

import copy
import dataclasses
import functools
import re
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.core.types import Tokenizer

MAX_TEXT = 1 << 22  # characters that are tokenised at once; no context is as long


class Text(NamedTuple):
    """A text of a conversation.

    Attributes:
      text: The text, without any image.
      kind: What its tokens are for.
      control: Whether a template wrote it, so that its control tokens are meant as such.
      spans: Pieces of it that are marked: first character, end, and the bits of the mark.
    """

    text: str
    kind: TokenKind
    control: bool
    spans: tuple[tuple[int, int, int], ...] = ()


Texts = tuple[Text, ...]  # texts that are tokenised as one string


class Encoded(NamedTuple):
    """The tokens of texts.

    Attributes:
      ids: Their numbers.
      kinds: What they are for.
      marks: The bits of the marks that they belong to.
    """

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    marks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Encodes consecutive texts as one string.

    >>> from moresjax.data.digits import build_tokenizer
    >>> encoder = TextEncoder(build_tokenizer())
    >>> asked = Text("two </s> three", TokenKind.QUESTION, control=False)
    >>> encoded = encoder((asked, Text(" </s>", TokenKind.ANSWER, control=True)))
    >>> encoder.tokenizer.convert_ids_to_tokens(encoded.ids)
    ['two', '<unk>', 'three', '</s>']

    Attributes:
      tokenizer: A fast tokenizer of `transformers`.
      split_special_tokens: Whether control tokens in texts that no template wrote are spelt out;
        else they are control tokens, which is what LLaVA does.
      markers: What the template writes around texts. Added tokens in it are control tokens even if
        the tokenizer does not call them special.
    """

    tokenizer: Tokenizer
    split_special_tokens: bool = True
    markers: str = ""

    def __call__(self, texts: Texts) -> Encoded:
        """The tokens of consecutive texts.

        A token has the kind of its last character, and is marked if any of its characters is.

        Raises:
          UserError: A control token in the text cannot be spelt out with this tokenizer, or a
            marked piece has no token.
        """
        encoded = _encode(self._backend, texts)
        if self.split_special_tokens and self._has_foreign_control(encoded, texts):
            return self._split(texts)
        return Encoded(tuple(encoded.ids), _kinds(encoded, texts), _marks(encoded, texts))

    @property
    def _backend(self) -> Any:
        return self.tokenizer.backend_tokenizer

    @functools.cached_property
    def _special(self) -> dict[int, Any]:
        """The special tokens and, among the other added ones, the template's own markup."""
        added = self._backend.get_added_tokens_decoder()
        return {i: token for i, token in added.items() if token.special or self._is_marker(token)}

    def _is_marker(self, token: Any) -> bool:
        """Whether it is one like `<|im_end|>` or `[INST]`; words and blanks belong to everybody."""
        markup = re.fullmatch(r"<[|/]?[A-Za-z]\S*>|\[/?[A-Z]\S*\]", token.content)
        return markup is not None and token.content in self.markers

    def _has_foreign_control(self, encoded: Any, texts: Texts) -> bool:
        """Whether a special token touches a text that no template wrote."""
        found = [n for n, i in enumerate(encoded.ids) if i in self._special]
        if not found:
            return False
        owners = _owners([encoded.offsets[n] for n in found], texts)
        foreign = np.array([not text.control and text.text != "" for text in texts])
        # A token that swallows blanks around it may begin and end in the template's text.
        return any(foreign[first : last + 1].any() for first, last in owners)

    @functools.cached_property
    def _splitter(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """A copy of the tokenizer that splits special tokens but knows each by another name.

        The names are ordinary added tokens that match where the special token would, so everything
        around them is tokenised as it is around the token itself. Nobody can type them: they are
        drawn anew in every process.

        Returns:
          The copy, the names by token, and the ids of the tokens by the ids of the names.
        """
        from tokenizers import AddedToken

        backend, secret = copy.deepcopy(self._backend), secrets.token_hex(8)
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        names, ids = {}, {}
        for number, (own, token) in enumerate(self._special.items()):
            kept = {flag: getattr(token, flag) for flag in flags}
            backend.add_special_tokens([AddedToken(token.content, special=True, **kept)])
            names[token.content] = name = f"x{secret}x{number}x"
            backend.add_tokens([AddedToken(name, special=False, **kept)])
            ids[backend.token_to_id(name)] = own
        backend.encode_special_tokens = True
        return backend, names, ids

    def _split(self, texts: Texts) -> Encoded:
        backend, names, ids = self._splitter
        renamed = self._rename(texts, names)
        encoded = _encode(backend, renamed)
        joined = "".join(item.text for item in renamed)
        unknown = self.tokenizer.unk_token_id
        if unknown in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            unknown = None
        result = []
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if token in ids:
                result.append(ids[token])
                continue
            special = self._special.get(token)
            if special is not None and token != unknown and special.content in joined[start:end]:
                # The vocabulary itself has the token as a word.
                if unknown is None:
                    raise UserError(
                        f"the text contains {special.content}, which this tokenizer can write as "
                        "its control token only"
                    )
                token = unknown
            result.append(token)
        return Encoded(tuple(result), _kinds(encoded, renamed), _marks(encoded, renamed))

    def _rename(self, texts: Texts, names: dict[str, str]) -> Texts:
        """The texts with the special tokens that the template wrote under their other names.

        They are found where they would be found if everybody else said something harmless.
        """
        harmless = tuple(t if t.control else t._replace(text=_harmless(t.text)) for t in texts)
        encoded = _encode(self._backend, harmless)
        places = [
            (*offsets, self._special[token].content)
            for token, offsets in zip(encoded.ids, encoded.offsets, strict=True)
            if token in self._special
        ]
        renamed, start = [], 0
        for item in texts:
            text, end = item.text, start + len(item.text)
            if item.control:
                own = [p for p in places if p[0] < end and p[1] > start]
                for first, last, content in reversed(own):
                    place = text.find(content, max(first - start, 0), last - start)
                    if place >= 0:
                        text = text[:place] + names[content] + text[place + len(content) :]
            renamed.append(item._replace(text=text))
            start = end
        return tuple(renamed)


def _encode(backend: Any, texts: Texts) -> Any:
    text = "".join(item.text for item in texts)
    if len(text) > MAX_TEXT:
        raise UserError(f"a text has {len(text):,d} characters; at most {MAX_TEXT:,d} are read")
    return backend.encode(text, add_special_tokens=False)


def _owners(offsets: Sequence[tuple[int, int]], texts: Texts) -> np.ndarray:
    """The numbers of the texts that have the first and the last character of each token."""
    borders = np.cumsum([len(item.text) for item in texts])
    ends = [(start, max(end - 1, start)) for start, end in offsets]
    return np.searchsorted(borders, ends, side="right")


def _kinds(encoded: Any, texts: Texts) -> tuple[int, ...]:
    if not encoded.ids:
        return ()
    return tuple(int(texts[i].kind) for i in _owners(encoded.offsets, texts)[:, 1])


def _marks(encoded: Any, texts: Texts) -> tuple[int, ...]:
    """The bits of every token: those of the marked pieces that it shares a character with."""
    marks, before = np.zeros(len(encoded.ids), int), 0
    for item in texts:
        for start, end, bits in item.spans:
            found = [
                n
                for n, (first, last) in enumerate(encoded.offsets)
                if max(first, before + start) < min(last, before + end)
            ]
            if not found and start < end:
                raise UserError(f"the marked text {item.text[start:end]!r} has no token")
            marks[found] |= bits
        before += len(item.text)
    return tuple(marks.tolist())


def _harmless(text: str) -> str:
    """A text of the same length and word borders that has no special token."""
    return re.sub(r"[^\w\s]", ".", re.sub(r"\w", "x", text))
