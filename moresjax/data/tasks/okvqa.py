"""OK-VQA: questions about COCO photos that need outside knowledge; one of ten answers each.

Files: `OpenEnded_mscoco_SPLIT2014_questions.json`, `mscoco_SPLIT2014_annotations.json`,
`SPLIT2014/`.
"""

from moresjax.data.generators import coco_questions, record, task


@task("okvqa")
def records(root, split, rng):
    for question, annotation, image in coco_questions(root, split, ""):
        answer = rng.choice(annotation["answers"])["answer"]
        yield record(question["question_id"], image, question["question"], answer)
