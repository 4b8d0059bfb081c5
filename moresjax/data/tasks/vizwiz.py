"""VizWiz-VQA: photos and questions of blind people, some of which cannot be answered.

Files: `Annotations/SPLIT.json`, `SPLIT/VizWiz_SPLIT_00000000.jpg`.
"""

from moresjax.data.generators import SHORT, read_json, record, task

NO_ANSWER = "Unanswerable"
HINT = f'When the information is insufficient, respond with "{NO_ANSWER}".'
WEIGHTS = {"yes": 3, "maybe": 1}  # by the confidence of who answered


@task("vizwiz")
def records(root, split, rng):
    for item in read_json(root, f"Annotations/{split}.json"):
        question = f"{item['question']} {HINT} {SHORT}"
        image = f"{split}/{item['image']}"
        yield record(item["image"], image, question, _answer(item, rng))


def _answer(item, rng) -> str:
    """A random answer, surer ones more often."""
    usable = [
        answer
        for answer in item["answers"]
        if answer["answer_confidence"] in WEIGHTS and answer["answer"].lower() != "unanswerable"
    ]
    if not item["answerable"] or not usable:
        return NO_ANSWER
    weights = [WEIGHTS[answer["answer_confidence"]] for answer in usable]
    return rng.choices(usable, weights)[0]["answer"]
