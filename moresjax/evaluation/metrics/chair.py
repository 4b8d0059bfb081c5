"""CHAIR: how many of the objects a caption mentions are not in the image.

Source: Rohrbach et al. 2018 and `LisaAnne/Hallucination`; recall and length are those of later
tools (OPERA, LLaVA Steering). Objects are the 80 of COCO; their synonyms come from that
repository's `data/synonyms.txt`, whose text the caller gives.

Plurals are where implementations differ (the original uses `pattern`, LLaVA Steering WordNet), by
some percent of the captions: report the name of the lemmatiser with every score. The one here,
`VOCABULARY`, takes an ending off only if that gives a word of the list.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from moresjax.core.errors import UserError

VOCABULARY = "vocabulary"  # The name to report for the lemmatiser of this file.

# Two words that together mean something else than one of them: what to read instead.
_COMPOUNDS = {
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "home plate",
    "train track": "train track",
    # The official list has this synonym with a stray blank, so it matches no object there.
    "motor bike": "motor bike",
}
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
_ENDINGS = (("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
_IRREGULAR = {"geese": "goose", "mice": "mouse"}
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|'\w+|[^\w\s]")


def parse_synonyms(text: str) -> dict[str, str]:
    """Synonym -> object, from lines `object, synonym, synonym, ...`.

    >>> parse_synonyms("dog, puppy")
    {'dog': 'dog', 'puppy': 'dog'}

    Raises:
      UserError: There are no lines.
    """
    lines = [line.strip().split(", ") for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError("the CHAIR synonyms are empty; give the text of the official synonyms.txt")
    return {word: names[0] for names in lines for word in names}


def _compounds(synonyms: Mapping[str, str]) -> dict[str, str]:
    pairs = {name: name for name in synonyms if name.count(" ") == 1}
    # A baby elephant is no person, and neither is a passenger train.
    babies = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS.split()}
    vehicles = {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    return pairs | babies | vehicles | _COMPOUNDS


def vocabulary_lemmatizer(synonyms: Mapping[str, str]) -> Callable[[str], str]:
    """The lemmatiser `VOCABULARY`: word -> singular.

    >>> vocabulary_lemmatizer(parse_synonyms("dog, puppy"))("puppies")
    'puppy'
    """
    known = {
        word for names in (synonyms, _compounds(synonyms)) for n in names for word in n.split()
    }

    def singular(word: str) -> str:
        if word in known or word in _IRREGULAR:
            return _IRREGULAR.get(word, word)
        for ending, replacement in _ENDINGS:
            stem = word.removesuffix(ending) + replacement
            if word.endswith(ending) and stem in known:
                return stem
        return word

    return singular


def caption_words(
    caption: str, synonyms: Mapping[str, str], singular: Callable[[str], str]
) -> list[str]:
    """Singular lower-case words and punctuation, with two-word terms joined.

    Args:
      caption: The text of a caption.
      synonyms: Synonym -> object, from `parse_synonyms`.
      singular: The lemmatiser.
    """
    compounds = _compounds(synonyms)
    tokens = [singular(word) for word in _WORD.findall(caption.lower())]
    words, i = [], 0
    while i < len(tokens):
        pair = " ".join(tokens[i : i + 2])
        words.append(compounds.get(pair, tokens[i]))
        i += 2 if pair in compounds else 1
    # "The seat of the toilet" is no chair.
    return [word for word in words if word != "seat"] if "toilet" in words else words


def mentioned_objects(words: Sequence[str], synonyms: Mapping[str, str]) -> list[str]:
    """The objects that words of a caption name, in order, with repetitions."""
    return [synonyms[word] for word in words if word in synonyms]


def chair_summary(
    words: Sequence[Sequence[str]],
    truths: Sequence[Collection[str]],
    synonyms: Mapping[str, str],
) -> dict[str, float]:
    """CHAIR of a set of captions, as fractions.

    >>> synonyms = parse_synonyms("dog, puppy")
    >>> chair_summary([["a", "puppy"]], [["dog"]], synonyms)["CHAIRs"]
    0.0

    Args:
      words: `caption_words` of every caption.
      truths: The objects in every caption's image: those that are segmented there and those that
        its reference captions mention.
      synonyms: Synonym -> object, from `parse_synonyms`.

    Returns:
      `CHAIRs`: share of captions with an object that is not there; `CHAIRi`: share of the mentions;
      `Recall`: share of the true objects that are mentioned; `Len`: words per caption.

    Raises:
      UserError: There are no captions, or not as many sets of objects.
    """
    if not words or len(words) != len(truths):
        raise UserError(
            f"CHAIR needs the objects of every caption, got {len(truths)} for {len(words)}"
        )
    mentions = [mentioned_objects(caption, synonyms) for caption in words]
    pairs = list(zip(mentions, truths, strict=True))
    false = [sum(name not in truth for name in names) for names, truth in pairs]
    found = sum(len(set(names) & set(truth)) for names, truth in pairs)
    return {
        "CHAIRs": sum(map(bool, false)) / len(words),
        "CHAIRi": sum(false) / max(1, sum(map(len, mentions))),
        "Recall": found / max(1, sum(len(set(truth)) for truth in truths)),
        "Len": sum(map(len, words)) / len(words),
    }
