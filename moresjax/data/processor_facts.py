"""What tells processors apart: facts that results carry, with a hash."""

import hashlib
import json
from typing import Any

from moresjax.data.processor import Processor
from moresjax.data.templates import OWN, template_name


def processor_facts(processor: Processor | None) -> dict[str, Any]:
    """Template, image size and the like, with a hash that tells them and the vocabulary apart."""
    if processor is None:
        return {"hash": ""}
    image, vocabulary = processor.image, sorted(processor.tokenizer.get_vocab().items())
    # What transformers saved does not always have a text that stays the same.
    saved = getattr(getattr(image, "reference", None), "to_dict", dict)()
    pixels = image and (image.mean, image.std, sorted(saved.items()))
    name = template_name(processor.template)
    facts = {
        "template": name,
        "vocabulary": short_hash(json.dumps(vocabulary)),
        "visual_tokens": processor.visual_tokens,
        "image_size": image and image.size,
        "image_aspect": image and image.aspect,
    }
    text = repr((facts, processor.template, processor.eos_ids, pixels))
    if name == OWN:  # of the named ones 0.1 and 0.2 did not note it
        text += f" {processor.template.around_system}" if processor.template.around_system else ""
    if processor.template.around_image or processor.template.task:
        text += f" {processor.template.around_image} {processor.template.task!r}"
    if not processor.split_special_tokens:
        text += " special tokens in text"
    if (penalty := processor.generation.repetition_penalty) != 1:
        text += f" penalty {penalty}"
    if processor.centres and processor.regions.kind != "boxes":
        text += f" roi {processor.regions}"
        if processor.regions.named:
            text += f" {json.dumps(dict(processor.regions.named), sort_keys=True)}"
    return facts | {"hash": short_hash(text)}


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
