"""Visual Genome (Krishna et al. 2017): regions whose phrases name colours, places or sentiments.

Training records only, for models whose concepts shift ("Analyzing Fine-tuning Representation Shift
for Multimodal LLMs Steering", appendix A.2). Files in the download, of
https://homes.cs.washington.edu/~ranjay/visualgenome/api.html: `region_descriptions.json`,
`image_data.json`, and the photos in `VG_100K/` and `VG_100K_2/`, as in the addresses of
`image_data.json`. The paper does not say how it chose among regions: here a photo gives one region,
drawn among those whose phrase has a word of the list as a whole word.
"""

import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.data.word_lists import word_list
from moresjax.evaluation.files import CAPTION, read_json
from moresjax.evaluation.training_files import Record, llava_record, training_records

# The list of each task, and about how many samples the paper has.
TASKS = {
    "vg_color": ("colors", 21_000),
    "vg_place": ("places", 27_000),
    "vg_sentiment": ("sentiments", 5_000),
}
FAR = 0.2  # counts that differ by more than this share are warned of


def keyword_records(task: str, root: Path, rng: random.Random) -> Iterator[Record]:
    """One region's phrase for each photo that has a fitting one, asked for as a caption.

    Args:
      task: A name in `TASKS`.
      root: The folder of the download.
      rng: Draws the regions.

    Raises:
      UserError: A file is missing, or a photo has no address.
    """
    name, published = TASKS[task]
    words = "|".join(map(re.escape, word_list(name)))
    pattern, count = re.compile(rf"\b(?:{words})\b", re.IGNORECASE), 0
    places = {
        photo["image_id"]: photo.get("url", "") for photo in read_json(root, "image_data.json")
    }
    for photo in read_json(root, "region_descriptions.json"):
        phrases = [region["phrase"].strip() for region in photo["regions"]]
        fitting = [phrase for phrase in phrases if pattern.search(phrase)]
        if not fitting:
            continue
        address = places.get(photo["id"], "").split("/")[-2:]
        if len(address) < 2:
            raise UserError(f"photo {photo['id']} has no address in image_data.json of {root}")
        count += 1
        yield llava_record(photo["id"], "/".join(address), CAPTION, rng.choice(fitting))
    if abs(count - published) > FAR * published:
        logging.getLogger(__name__).warning(
            "%s: %d photos have a fitting region, the paper has about %d", task, count, published
        )


@training_records("vg_color")
def colors(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """Regions that name a colour; there is one split."""
    return keyword_records("vg_color", root, rng)


@training_records("vg_place")
def places(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """Regions that name a place; there is one split."""
    return keyword_records("vg_place", root, rng)


@training_records("vg_sentiment")
def sentiments(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """Regions that name a sentiment; there is one split."""
    return keyword_records("vg_sentiment", root, rng)
