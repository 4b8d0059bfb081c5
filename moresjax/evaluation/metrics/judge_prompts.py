"""Prompts for LLM judges, in this project's wording of each benchmark's protocol.

To compare with published numbers fill in the benchmark's own text instead, with the same fields;
`prompt_hash` tells them apart in the results.
"""

import hashlib
import re

from moresjax.core.errors import UserError

_FIELD = re.compile(r"\{(question|answer|prediction|image_content)\}")

_MM_VET = """\
Grade how well a prediction agrees with the ground truth, from 0.0 (not at all) to 1.0 (fully), in
steps of 0.1. Parts joined by <AND> are all needed, and each missing one costs its share; of parts
joined by <OR> one is enough. Complete the last row with the number only.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which fruits are in the bowl? | apple <AND> pear | There is a banana. | 0.0
Which fruits are in the bowl? | apple <AND> pear | I see an apple. | 0.5
Which fruits are in the bowl? | apple <AND> pear | A pear and an apple. | 1.0
What is the animal? | cat <OR> kitten | a small kitten | 1.0
{question} | {answer} | {prediction} | """

_HALLUSIONBENCH = """\
Decide whether a prediction agrees with the reference answer to a question. Reply "correct" if it
does not contradict the reference, "incorrect" if it does, and "unclear" if it takes no side.

Question: {question}
Reference answer: {answer}
Prediction: {prediction}
Verdict:"""

_MMHAL = """\
Rate the answer of a model to a question about an image. You do not see the image: its objects and
a good answer are given. A hallucination is a statement that neither supports.

Image contents: {image_content}
Question: {question}
Good answer: {answer}
Model's answer: {prediction}

Explain briefly, then end with "Rating: n", where n is
6: very informative, with insight, no hallucination
5: very informative, no hallucination
4: somewhat informative, no hallucination
3: not informative, no hallucination
2: very informative, with hallucination
1: somewhat informative, with hallucination
0: not informative, with hallucination"""

_MRT = """\
Does the prediction give the same answer as the ground truth? Reply Yes or No only.

Task: {question}
Ground truth: {answer}
Prediction: {prediction}
Same answer:"""

PROMPTS = {
    "mm_vet": _MM_VET,
    "hallusionbench": _HALLUSIONBENCH,
    "mmhal": _MMHAL,
    "mrt": _MRT,
}
# Text that is added to MM-Vet's prompt when a reply could not be read; after five attempts the
# grade is 0.
MM_VET_RETRY = "\nThe number for the correctness is: "
MM_VET_ATTEMPTS = 5


def fill(template: str, **fields: str) -> str:
    """A prompt with `{question}`, `{answer}`, `{prediction}`, `{image_content}` filled in.

    >>> fill("Is {prediction} right?", prediction="4")
    'Is 4 right?'

    Args:
      template: The text of a prompt.
      fields: The texts to fill in, by field.

    Raises:
      UserError: A field of the template is not given.
    """

    def value(match: re.Match) -> str:
        if match[1] not in fields:
            raise UserError(f"the judge prompt needs {match[1]!r}; given are: {', '.join(fields)}")
        return fields[match[1]]

    return _FIELD.sub(value, template)


def prompt_hash(template: str) -> str:
    """Twelve hexadecimal digits that identify a prompt's text."""
    return hashlib.sha256(template.encode()).hexdigest()[:12]
