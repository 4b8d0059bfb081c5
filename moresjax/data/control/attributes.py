"""Questions of TextVQA about a name, a colour or a brand (MRT, section S6.2).

Files of https://textvqa.org/dataset/ in `textvqa/`: `TextVQA_0.5.1_SPLIT.json`,
`TextVQA_Rosetta_OCR_v0.2_SPLIT.json`, whose words are the regions, and `train_images/`.
"""

import dataclasses
import functools
import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.data.control.cases import NOT_SURE, OTHER, TARGET, Case, Scenario
from moresjax.data.control.questions import Marked, word_span
from moresjax.data.images import named_image
from moresjax.data.regions import Box

NAME = "textvqa"
ATTRIBUTES = ("name", "color", "brand")
WORD = 4  # of "what is the name ..."
SIZES = {"train": 8_017, "val": 1_189}  # as the paper prints them
_OPENING = re.compile(rf"what is the ({'|'.join(ATTRIBUTES)})\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class AttributeQuestion:
    """A question of TextVQA about an attribute, and the boxes of the words in its photo."""

    id: str
    image: Any
    text: str
    attribute: str
    answers: tuple[str, ...]
    boxes: tuple[Box, ...]

    def case(self, scenario: Scenario) -> Case:
        """The question in the scenario `indeterminate`; the words in the photo are its region."""
        target = self.attribute == scenario.target
        majority = Counter(self.answers).most_common(1)[0][0]
        return Case(
            self.id,
            TARGET if target else OTHER,
            self.image,
            Marked(self.text, word_span(self.text, WORD)),
            NOT_SURE if target else majority,
            self.answers,
            self.attribute,
            self.boxes,
        )


@functools.lru_cache(maxsize=2)
def attribute_questions(root: str, split: str) -> tuple[AttributeQuestion, ...]:
    """The questions of a split that begin with "what is the" and an attribute.

    Another number of them than the paper's is a warning: it does not say how it chose.

    Raises:
      UserError: The split is unknown, a file is missing or not as published, or there are none.
    """
    if split not in SIZES:
        raise choice_error("split of textvqa", split, SIZES)
    folder = Path(root) / NAME
    rows = _data(folder / f"TextVQA_0.5.1_{split}.json")
    words = {
        row["image_id"]: _boxes(row.get("ocr_info", ()))
        for row in _data(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json")
    }
    found = []
    for row in rows:
        text = " ".join(row["question"].split())
        if (match := _OPENING.match(text)) is None or not row.get("answers"):
            continue
        name = f"textvqa-{split}-{row['question_id']}"
        image = named_image(folder / "train_images", f"{row['image_id']}.jpg", name)
        answers, boxes = tuple(row["answers"]), words.get(row["image_id"], ())
        found.append(AttributeQuestion(name, image, text, match[1].lower(), answers, boxes))
    if not found:
        raise UserError(f"{folder} has no question that begins with 'what is the name'")
    if len(found) != SIZES[split]:
        logging.getLogger(__name__).warning(
            f"textvqa {split} has {len(found):,d} questions about {', '.join(ATTRIBUTES)}; the "
            f"paper counts {SIZES[split]:,d}"
        )
    return tuple(found)


def _data(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; it belongs to TextVQA's official download")
    try:
        return json.loads(path.read_text(encoding="utf-8"))["data"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not as published: it has no list 'data'") from None


def _boxes(words: Any) -> tuple[Box, ...]:
    """Boxes of the words of a photo, cut at its border; what is outside is left out."""
    found = []
    for word in words:
        box = word["bounding_box"]
        left, top = box["top_left_x"], box["top_left_y"]
        right, bottom = left + box["width"], top + box["height"]
        x0, y0, x1, y1 = (min(max(float(x), 0.0), 1.0) for x in (left, top, right, bottom))
        if x0 < x1 and y0 < y1:
            found.append((x0, y0, x1, y1))
    return tuple(found)
