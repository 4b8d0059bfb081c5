"""TextCaps: captions that mention the text in a photo, with the tokens an OCR system found.

Files: `TextCaps_0.1_SPLIT.json`, `TextVQA_Rosetta_OCR_v0.2_SPLIT.json`, `train_images/` (also holds
the photos of `val`). One sample per photo, with one of its captions.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.data.generators import read_json, record, register_task

REQUEST = "Provide a one-sentence caption for the provided image."


@register_task("textcaps")
def records(root: Path, split: str, rng: random.Random) -> Iterator[dict]:
    """One caption of every photo."""
    found = read_json(root, f"TextVQA_Rosetta_OCR_v0.2_{split}.json")["data"]
    words = {item["image_id"]: item["ocr_tokens"] for item in found}
    photos = {}
    for item in read_json(root, f"TextCaps_0.1_{split}.json")["data"]:
        photos.setdefault(item["image_id"], item["reference_strs"])
    folder = "test_images" if split == "test" else "train_images"
    for photo, captions in photos.items():
        request = f"{REQUEST}\nReference OCR token: {', '.join(words.get(photo, ()))}"
        yield record(photo, f"{folder}/{photo}.jpg", request, rng.choice(captions))
