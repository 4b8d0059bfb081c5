"""A plug-in with one of everything that can be added to moresjax without editing it.

    moresjax train --plugin my_plugin.py --config my_config.py --workdir runs/mine
    moresjax evaluate --plugin my_plugin.py --model runs/mine --tasks grey_images --out runs/scores

Axis legend: B rows, S tokens, D hidden size, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moresjax.core.layout import loss_mask, valid_mask
from moresjax.data.samples import Sample, Turn
from moresjax.data.sources import register_source
from moresjax.data.templates import Template, register_template
from moresjax.evaluation.examples import Example
from moresjax.evaluation.tasks import BenchmarkTask, benchmark
from moresjax.training.objectives import Loss, register_objective
from moresjax.tuning.base import Edit, register
from moresjax.tuning.sites import edit_dim

SIZE = 32  # pixels
ANSWERS = ("no", "yes")


@register
@dataclasses.dataclass(frozen=True)
class Shift(Edit):
    """A tuning method, `tuning=shift`: a learned vector is added to every visual token."""

    name = "shift"
    site: str = "llm.block.out"

    def sites(self, config):
        """Where it acts, and the number of features there."""
        return {self.site: (edit_dim(self, self.site, config),)}

    def initial(self, key, dim):
        """Its parameters in one layer: at the start it changes nothing."""
        return {"shift": jnp.zeros(dim)}

    def delta(self, params, h):
        """What is added to activations `[B, S, D]`."""
        return jnp.broadcast_to(params["shift"], h.shape)


@register_source("grey")
@dataclasses.dataclass(frozen=True)
class GreyImages:
    """A source, `config.data = {"name": "grey", "size": 100}`: is the image bright?

    Reading a sample is a pure function of its index, which makes a resumed run exact.
    """

    size: int = 64
    branches = False  # no sample has several independent questions

    def __len__(self):
        return self.size

    def __getitem__(self, index: int) -> Sample:
        """One conversation about one image."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        brightness = np.random.default_rng(index).integers(256)
        image = np.full((SIZE, SIZE, 3), brightness, np.uint8)
        turn = Turn("<image>\nis there a larger", ANSWERS[int(brightness > 127)])
        return Sample(f"grey-{index}", (turn,), (image,))


# A template, `config.template = "asking"`: a question mark before every answer.
register_template("asking", Template(user="", assistant=" ?"))


@benchmark("grey_images")
def load(data_root=None, limit=None, split="test"):
    """A benchmark, `--tasks grey_images`."""
    samples = GreyImages(limit or 64)
    examples = [
        Example(sample.id, sample.turns[0].question, sample.turns[0].answer, sample.images)
        for sample in (samples[i] for i in range(len(samples)))
    ]
    return [BenchmarkTask("grey_images", examples, max_new_tokens=1)]


@register_objective("smoothed")
def smoothed(model, batch, key=None) -> Loss:
    """An objective, `config.objective = "smoothed"`: cross-entropy with smoothed labels."""
    logits = model.llm.logits(model(batch, key=key).hidden)  # [B, S, V]
    labels = jnp.roll(jnp.asarray(batch.tokens), -1, axis=1)
    mask = loss_mask(batch.layout).astype(jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
    losses = optax.softmax_cross_entropy(logits, targets)
    correct = logits.argmax(-1) == labels
    return Loss(
        total=(losses * mask).sum(),
        weight=mask.sum(),
        correct=(correct * mask).sum(),
        tokens=valid_mask(batch.layout).sum(dtype=jnp.float32),
    )
