"""Images of the digits world, for the page's first question."""

import base64
import functools
import io
from typing import Any

import numpy as np
from PIL import Image

from moresjax.data.digits import FAMILIES, ask, make_scene

COUNT = 6


@functools.cache
def sample_images() -> list[dict[str, Any]]:
    """Scenes with a question and its answer, the image as a data URI.

    >>> sorted(sample_images()[0])
    ['answer', 'image', 'name', 'question']
    """
    found, rng = [], np.random.default_rng(0)
    for number in range(COUNT):
        scene = make_scene(rng, "test")
        turn = ask(FAMILIES[number % len(FAMILIES)], scene.digits, rng)
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "png")
        address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        told = {"name": f"digits {number + 1}", "question": turn.question, "answer": turn.answer}
        found.append(told | {"image": address})
    return found
