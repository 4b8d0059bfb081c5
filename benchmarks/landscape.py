"""What a point of a loss landscape costs beside a forward pass over the same samples.

    python benchmarks/landscape.py [--rounds 7] [--points 5]

A LLaVA with random weights, 16 samples with an image in two batches. `forward` is the validation
loss as training measures it, a call for each batch; a point also moves all parameters that train.
The vision encoder runs at every point where the method trains something in it (`mrt`), and once for
all points where it does not (`lora`).
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rounds import Run, measure, median_ratio

from moresjax.analysis.landscape import draw_directions, losses_on_plane, make_axis
from moresjax.core.layout import Batch, TokenKind
from moresjax.evaluation.landscape.loss import RunLoss
from moresjax.hardware.host import use_huge_pages
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.sharding.mesh import make_mesh
from moresjax.testing.batches import random_batch, row_layout, stack_layout
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model

METHODS = ("lora:rank=8", "mrt", "full")
BATCHES, ROWS = 2, 8


def make_model(tuning: str) -> MLLM:
    llm = DecoderConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_layers=6,
        num_heads=8,
        unroll=True,
    )
    vision = VisionConfig(
        image_size=96,
        patch_size=16,
        hidden_size=128,
        intermediate_size=512,
        num_layers=6,
        num_heads=4,
        unroll=True,
    )
    model = MLLM(MLLMConfig(llm=llm, vision=vision), tuning)
    initialize(model, 0)
    return model


def make_batches(model: MLLM) -> Batch:
    """Random batches, stacked."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda *x: jnp.stack(x), *(batch_of(model, rng) for _ in range(BATCHES)))


def batch_of(model: MLLM, rng: np.random.Generator) -> Batch:
    """Rows with an image, a question and an answer."""
    visual = model.config.visual_tokens
    pieces = [(TokenKind.SYSTEM, 8), (TokenKind.IMAGE, visual), (TokenKind.QUESTION, 60)]
    layout = stack_layout([row_layout(*pieces, (TokenKind.ANSWER, 24))] * ROWS, visual)
    return random_batch(layout, 4096, 1, 96, rng)


def variants(tuning: str, points: int) -> dict[str, Run]:
    model = make_model(tuning)
    batches, mesh = make_batches(model), make_mesh(devices=jax.devices()[:1])
    graphdef, trainable, frozen = split_model(model, ("connector",))
    loss = RunLoss(graphdef, next_token, mesh)
    data = loss.data(trainable, frozen, batches)
    drawn = draw_directions(trainable, 0, 0, tuning=model.tuning)
    side = make_axis(points, 1.0)

    @jax.jit
    def validation(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> jax.Array:
        found = next_token(nnx.merge(graphdef, trainable, frozen), batch)
        return found.total / found.weight

    each = [jax.tree.map(lambda x: x[n], batches) for n in range(BATCHES)]  # noqa: B023

    def forward():
        for _ in range(len(side) ** 2):
            losses = [float(validation(trainable, frozen, batch)) for batch in each]
        yield "all"
        return statistics.fmean(losses)

    def plane():
        found = dict(losses_on_plane(loss, trainable, data, drawn, side, chunk=16))
        yield "all"
        return found

    (start,) = losses_on_plane(loss, trainable, data, drawn, make_axis(3, 1.0), chunk=16)
    centre = float(np.mean([validation(trainable, frozen, batch) for batch in each]))
    np.testing.assert_allclose(start[1][4], centre, rtol=1e-5)
    return {"forward": forward, "plane": plane}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--points", type=int, default=5, help="points of an axis")
    parser.add_argument("--tunings", nargs="+", default=METHODS)
    args = parser.parse_args()
    use_huge_pages()
    print("| tuning | points x forward, s | plane, s | ratio |")
    print("|---|---:|---:|---:|")
    for tuning in args.tunings:
        seconds = measure(variants(tuning, args.points), args.rounds, warm=1)
        times = [statistics.median(own["all"]) for own in seconds.values()]
        cells = [f"{took:.2f}" for took in times] + [f"{median_ratio(seconds, 'plane', 'all'):.3f}"]
        print(f"| `{tuning}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
