"""Regions of interest that a model finds itself: where it looks before it answers.

Axis legend: V visual tokens of an image.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moresjax.analysis.attention import AttentionMaps
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.data.processor import Processor
from moresjax.data.region_providers import RegionProvider
from moresjax.data.regions import Box, Placement
from moresjax.data.samples import Sample
from moresjax.generation.lengths import bucket
from moresjax.models.mllm import MLLM
from moresjax.tuning.attach import Tuning


def attended_regions(
    mllm: MLLM, processor: Processor, sample: Sample, provider: RegionProvider
) -> Sample:
    """A prompt whose regions are the patches that its last token attends to most.

    The model reads the prompt without its tuning. Attention is that of one layer, averaged over
    heads; of each image so many per cent of the visual tokens are taken, at least one.

    Args:
      mllm: The model.
      processor: Its processor.
      sample: The prompt.
      provider: `attention(LAYER;P%)`.

    Raises:
      UserError: The model has no such layer, or an image cannot be read.
    """
    layers = mllm.config.llm.num_layers
    if not provider.layer < layers:
        raise UserError(f"roi={provider}: the model has layers 0-{layers - 1}")
    plain, image = dataclasses.replace(processor, marks=(), centres=()), processor.image
    assert image is not None  # a model without images was refused with the text
    row = plain.row(sample)
    batch = plain.batch([plain.pad(row, bucket(len(row)), row.num_images)])
    graphdef, state = nnx.split(mllm)
    maps = np.asarray(_maps(graphdef, state, batch, jnp.asarray([[len(row) - 1]])))
    values = maps[provider.layer, 0, 0][np.flatnonzero(row.image >= 0)]
    centres = np.asarray(processor.centres)
    regions = []
    for source, attention in zip(sample.images, np.split(values, len(sample.images)), strict=True):
        regions.append(_boxes(attention, centres, image.placement(source), provider.percent))
    return dataclasses.replace(sample, roi=tuple(regions))


def _boxes(
    attention: Float[np.ndarray, " V"],
    centres: Float[np.ndarray, "V 2"],
    placement: Placement,
    percent: float,
) -> tuple[Box, ...]:
    """A box around the centre of every token that is attended to most, inside the image."""
    corner, sides = np.asarray(placement[:2]), np.asarray(placement[2:])
    places = (centres - corner) / sides
    inside = np.all((places > 0) & (places < 1), axis=1)  # not of the padding, nor the class token
    count = max(round(len(centres) * percent / 100), 1)
    order = np.argsort(np.where(inside, -attention, np.inf), kind="stable")[:count]
    distinct = [np.unique(centres[inside, axis].round(6)) for axis in (0, 1)]
    steps = [np.diff(own).min() if len(own) > 1 else 1.0 for own in distinct]
    half = np.asarray(steps) / 2 / sides
    boxes = []
    for middle in places[[n for n in order if inside[n]]]:
        low, high = np.maximum(middle - half, 0), np.minimum(middle + half, 1)
        boxes.append((float(low[0]), float(low[1]), float(high[0]), float(high[1])))
    return tuple(boxes)


def _read(
    graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, queries: Array
) -> Float[Array, "L B Q S"]:
    model = nnx.merge(graphdef, state)
    model.tuning = Tuning("none", model.config)
    return model(batch, probes=(AttentionMaps(),), queries=queries).stats["maps"]


_maps = jax.jit(_read, static_argnums=0)
