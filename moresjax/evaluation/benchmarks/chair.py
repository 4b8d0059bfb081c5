"""CHAIR (Rohrbach et al. 2018): objects in captions that are not in the photo.

Files in `chair/`: `instances_val2014.json` and `captions_val2014.json` (COCO's
`annotations_trainval2014.zip`) and `synonyms.txt` (`data/` of
https://github.com/LisaAnne/Hallucination). Photos in `coco/val2014/`. The 500 photos are LLaVA
Steering's: Python's `random.sample` with seed 42.
"""

import random
from collections import defaultdict
from collections.abc import Sequence

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    coco_image,
    limit_rows,
    llava_prompt,
    read_json,
    require_file,
    result_reader,
)
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.metrics.chair import (
    VOCABULARY,
    caption_words,
    chair_summary,
    mentioned_objects,
    parse_synonyms,
    vocabulary_lemmatizer,
)
from moresjax.evaluation.scoring import Predictions, TaskScore
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

PHOTOS, SEED = 500, 42
REQUEST = "Please describe this image in detail."


@benchmark("chair")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """CHAIRs (lower is better), CHAIRi, recall and length."""
    folder = benchmark_folder("chair", data_root)
    check_split("chair", split, ("val",))
    synonyms = parse_synonyms(require_file(folder / "synonyms.txt").read_text(encoding="utf-8"))
    singular = vocabulary_lemmatizer(synonyms)
    captions = read_json(folder, "captions_val2014.json")
    instances = read_json(folder, "instances_val2014.json")
    names = {row["id"]: row["name"] for row in instances["categories"]}

    photos = captions["images"]
    chosen = random.Random(SEED).sample(photos, min(PHOTOS, len(photos)))
    chosen = [photo["id"] for photo in limit_rows(chosen, limit, "chair", PHOTOS)]
    truths = defaultdict(set, {number: set() for number in chosen})
    for row in instances["annotations"]:
        if row["image_id"] in truths:
            truths[row["image_id"]].add(synonyms[names[row["category_id"]]])
    for row in captions["annotations"]:
        if row["image_id"] in truths:
            words = caption_words(row["caption"], synonyms, singular)
            truths[row["image_id"]].update(mentioned_objects(words, synonyms))
    examples = [
        Example(
            str(number),
            llava_prompt(REQUEST, ""),
            sorted(truths[number]),
            (coco_image(data_root, "val2014", number),),
        )
        for number in chosen
    ]

    def scorer(
        examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
    ) -> TaskScore:
        words = [caption_words(text or "", synonyms, singular) for text in predictions]
        true = [example.answer for example in examples]
        # Saying nothing is no way to avoid hallucinations.
        values = [
            float(text is None or not set(mentioned_objects(found, synonyms)) <= set(objects))
            for text, found, objects in zip(predictions, words, true, strict=True)
        ]
        details = chair_summary(words, true, synonyms)
        return TaskScore(
            "CHAIRs", values, details | {"lemmatiser": VOCABULARY, "seed": SEED}, fraction=False
        )

    read = result_reader("image_id", "caption")
    return [BenchmarkTask("chair", examples, max_new_tokens=512, scorer=scorer, read=read)]
