"""Hidden states of a model's answers, read while it generates.

Axis legend: L layers, N states, D features.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import jax
import numpy as np
from jaxtyping import Float

from moresjax.analysis.capture import (
    CANDIDATES,
    MATCHES,
    AnswerState,
    StateProbe,
    Take,
    answer_states,
    begins_word,
    site_layers,
    word_ids,
)
from moresjax.analysis.states import Key, States, StatesWriter
from moresjax.core.errors import UserError, choice_error
from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.data.images import image_names
from moresjax.generation.scheduler import Completion
from moresjax.inference.prompt_inputs import check_images
from moresjax.tuning.sites import num_layers

if TYPE_CHECKING:
    from moresjax.inference.model import Model

NEW = 16  # new tokens of an answer, where no number is given
FIELDS = ("id", "prompt", "images", "answers", "metadata", "roi", "marks")
Item = str | Mapping[str, Any]
Layers = str | int | Sequence[int] | None


class StatesOptions(TypedDict, total=False):
    """Keyword arguments of `states`, which documents them."""

    site: str | Sequence[str]
    layers: Layers
    take: str
    match: str
    max_new_tokens: int | None
    batch_size: int
    adapters: str | Sequence[str | None] | None
    out: str | Path | None
    dtype: str
    skip_bad: bool
    meta: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Capture:
    """What is read of each answer.

    Attributes:
      keys: The sites and layers.
      probes: A probe for each site.
      take: Which state of an answer.
      match: How words of take `token` are found.
    """

    keys: tuple[Key, ...]
    probes: tuple[StateProbe, ...]
    take: Take
    match: str

    @classmethod
    def of(
        cls, model: "Model", site: str | Sequence[str], layers: Layers, take: str, match: str
    ) -> "Capture":
        """What `states` is asked for.

        Raises:
          UserError: The model has no such site or layer, the take or the match is none, or they do
            not go together.
        """
        if match not in MATCHES:
            raise choice_error("match", match, MATCHES)
        sites = [site] if isinstance(site, str) else list(site)
        chosen, probes, keys = Take.parse(take), [], []
        ids = word_ids(model.prompts.tokenizer, chosen.words) if chosen.words else ()
        for one in sites:
            own = site_layers(one, layers, model.config)
            if not one.startswith("llm.") and chosen.kind != "prompt":
                raise UserError(
                    f"states at {one} are means over the tokens of the images, which no token of "
                    "an answer changes; take=prompt"
                )
            layered = num_layers(one, model.config)
            options = {"take": chosen.kind, "ids": ids}
            options["candidates"] = CANDIDATES if match == "word" else 1
            probes.append(StateProbe(one, own if layered else None, **options))
            keys += [(one, layer) for layer in own]
        return cls(tuple(keys), tuple(probes), chosen, match)

    def size(self, model: "Model") -> int:
        """D, the number of features of a state.

        Raises:
          UserError: The sites have different numbers of features.
        """
        vision, llm = model.config.vision, model.config.llm.hidden_size
        sizes = {
            getattr(vision, "hidden_size", 0) if site.startswith("vision.") else llm
            for site, _ in self.keys
        }
        if len(sizes) > 1:
            raise UserError("sites of different widths need a call and a folder each")
        return sizes.pop()

    def read(
        self, completion: Completion, spell: Callable[[Ids], str]
    ) -> list[tuple[AnswerState, dict[Key, np.ndarray]]]:
        """The states of one answer: one, or one for each of its tokens, at every key."""

        def begins(place: int) -> bool:
            if self.match == "first-token":
                return True
            return begins_word(spell, completion.tokens, place, self.take.words)

        each = [
            answer_states(completion.stats[probe.name], self.take, begins) for probe in self.probes
        ]
        found = []
        for own in zip(*each, strict=True):
            rows = [row for one in own for row in one.state]
            found.append((own[0], dict(zip(self.keys, rows, strict=True))))
        return found


def states(
    model: "Model",
    items: Sequence[Item],
    *,
    site: str | Sequence[str] = "llm.block.out",
    layers: Layers = None,
    take: str = "prompt",
    match: str = "word",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    adapters: str | Sequence[str | None] | None = None,
    out: str | Path | None = None,
    dtype: str = "float32",
    skip_bad: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> States:
    """Hidden states of a model's answers.

    Args:
      model: The model that answers.
      items: What it is asked: texts, or mappings with `prompt` and, where there are some, `images`
        (as `Model.generate` takes those of one text), `id` (default: the number), `answers` and
        `metadata`, which the index of the states then has too.
      site: A site, or several of one width: `llm.embed.out`, `llm.block.out`, `llm.block.attn.out`,
        `llm.block.mlp.out`, `llm.norm.out`, and the means over the tokens of a prompt's images at
        `vision.block.out` and `connector.out`. States are what edits have left.
      layers: The layers of a site inside the blocks: a number, numbers, or a choice as methods take
        it (`31`, `0-3`, `4;5`); default: all.
      take: `prompt`, the state of the query of the first new token; `answer`, the mean over the
        queries of all new tokens but the end token; `token(WORD;WORD)`, the query of the first
        token of one of these words, where one first occurs; `each`, a state for every new token.
      match: `word`: an answer has a word where its text has it as a whole word, in any case;
        `first-token`: where a token occurs that the word may begin with.
      max_new_tokens: Answers have at most this many tokens; default: 16, and 1 for `prompt`.
      batch_size: How many prompts are answered at a time.
      adapters: The name of the loaded adapter that answers, or for every item its name or None for
        the base model.
      out: A folder to write the states to while they are read. A call that was killed goes on: it
        asks only what the folder does not have.
      dtype: Of the folder: `float16`, `bfloat16` or `float32`.
      skip_bad: Whether items that cannot be asked, such as those with a broken image, are left out
        with a warning.
      meta: What else `states.json` is to say of the states.

    Returns:
      The states in the order of the items, or in that of the folder.

    Raises:
      UserError: As `Model.generate`; the model has no such site or layer, two items have one id, a
        word has no tokens, a state is not finite, or the folder holds other states.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    capture = Capture.of(model, site, layers, take, match)
    if max_new_tokens is None:
        max_new_tokens = 1 if capture.take.kind == "prompt" else NEW
    whole = [_item(item, number) for number, item in enumerate(items)]
    _check_different([item["id"] for item in whole])
    names = model.adapter_names(adapters, len(whole))
    facts = {
        "take": str(capture.take),
        "match": match,
        "max_new_tokens": max_new_tokens,
        **model.provenance,
        **(meta or {}),
    }
    asking = _Asking(max_new_tokens, batch_size, skip_bad)
    if out is None:
        return _in_memory(model, whole, names, capture, asking, facts)
    process = jax.process_index()
    size, options = capture.size(model), {"dtype": dtype, "process": process}
    with StatesWriter(out, capture.keys, size, facts, **options) as writer:
        pending = [number for number, item in enumerate(whole) if item["id"] not in writer.done]
        asked = [whole[number] for number in pending]
        own = names and [names[number] for number in pending]
        for found in _answers(model, asked, own, capture, asking):
            writer.extend(found)
    return States(out)


def _item(item: Item, number: int) -> dict[str, Any]:
    """An item with all of its fields.

    Raises:
      UserError: It has no prompt, or a field that is none.
    """
    fields = {"prompt": item} if isinstance(item, str) else dict(item)
    for name in fields:
        if name not in FIELDS:
            raise choice_error(f"field of item {number}", name, FIELDS)
    if not isinstance(fields.get("prompt"), str):
        raise UserError(f"item {number} needs a prompt, which is a text")
    name = fields.get("id")
    whole = dict.fromkeys(FIELDS) | {"images": (), "metadata": {}} | fields
    images = check_images(whole["images"], f"item {number}")
    return whole | {"id": str(number if name is None else name), "images": images}


def _check_different(ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"two items have the id {twice!r}; states are told apart by ids")


def _in_memory(
    model: "Model",
    items: Sequence[Mapping[str, Any]],
    adapters: Sequence[str | None] | None,
    capture: Capture,
    asking: "_Asking",
    facts: Mapping[str, Any],
) -> States:
    """States of items in the order of these."""
    found: dict[str, list] = {item["id"]: [] for item in items}
    for pairs in _answers(model, items, adapters, capture, asking):
        found[pairs[0][0]["id"]] += pairs
    rows = [pair for own in found.values() for pair in own]
    if not rows:
        raise UserError("there is no item to read the states of")
    arrays = {key: np.stack([states[key] for _, states in rows]) for key in capture.keys}
    return States.from_arrays(arrays, [row for row, _ in rows], facts)


Found = tuple[dict[str, Any], dict[Key, Float[np.ndarray, " D"]]]


@dataclasses.dataclass(frozen=True)
class _Asking:
    """The most new tokens, the rows at a time, and whether bad items are skipped."""

    limit: int
    batch_size: int
    skip_bad: bool


def _answers(
    model: "Model",
    items: Sequence[Mapping[str, Any]],
    adapters: Sequence[str | None] | None,
    capture: Capture,
    asking: _Asking,
) -> Iterator[list[Found]]:
    """The rows of the index and the states of each item, as soon as it has been answered."""
    size = asking.batch_size * model.service.config.batches_per_chunk
    for start in range(0, len(items), size):
        rows, known = {}, {}
        for number, item in enumerate(items[start : start + size], start):
            name = f"item {item['id']}"
            try:
                pointed = {"roi": item["roi"], "marks": item["marks"]}
                asked = item["prompt"], item["images"], name, known
                rows[number] = model.prompts.row(*asked, **pointed)
                model.service.check_context(rows[number], asking.limit)
            except UserError as error:
                rows.pop(number, None)
                _skip(item, error, asking)
        while rows:
            names = adapters and [adapters[number] for number in rows]
            numbers = list(rows)
            stream = model.service.stream(
                list(rows.values()),
                asking.limit,
                batch_size=asking.batch_size,
                probes=capture.probes,
                adapters=names,
            )
            try:
                for place, completion in stream:
                    item = items[numbers[place]]
                    prediction = model.prompts.text(completion.tokens)
                    found = capture.read(completion, model.prompts.spell)
                    pairs = [(_row(item, prediction, state), own) for state, own in found]
                    del rows[numbers[place]]
                    yield [(row, _finite(own, item)) for row, own in pairs]
            except Exception:  # of an image that cannot be read, which costs its items only
                broken = {n: error for n, row in rows.items() if (error := _broken(row))}
                if not broken or not asking.skip_bad:
                    raise
                for number, error in broken.items():
                    rows.pop(number)
                    _skip(items[number], error, asking)


def _skip(item: Mapping[str, Any], error: Exception, asking: _Asking) -> None:
    """Says that an item cannot be asked, or raises the error."""
    if not asking.skip_bad:
        raise error
    logging.getLogger(__name__).warning(f"item {item['id']} is left out: {error}")


def _broken(row: Row) -> Exception | None:
    """Why the images of a row cannot be read."""
    try:
        np.asarray(row.pixels)
    except Exception as error:
        return error
    return None


def _row(item: Mapping[str, Any], prediction: str, state: AnswerState) -> dict[str, Any]:
    """The row of the index for a state."""
    return {
        "id": item["id"],
        "images": image_names(item["images"]),
        "prompt": item["prompt"],
        "answers": item["answers"],
        "prediction": prediction,
        "found": state.found,
        "place": state.place,
        "count": state.count,
        "metadata": dict(item["metadata"]),
    }


def _finite(states: dict[Key, np.ndarray], item: Mapping[str, Any]) -> dict[Key, np.ndarray]:
    """The states of an item.

    Raises:
      UserError: Some of them are no finite numbers.
    """
    for (site, layer), state in states.items():
        if not np.isfinite(state).all():
            raise UserError(f"the state of item {item['id']} at {site} {layer} is not finite")
    return states
