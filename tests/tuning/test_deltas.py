"""Weight deltas: definitions, merging, gradients, counts, and what cannot be combined."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft.tuners.boft.layer import BOFTLayer

from moresjax.core.errors import UserError
from moresjax.models.count import count_parameters
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.models.zoo import mllm_config
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_config, tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import METHODS
from moresjax.tuning.merge import merged
from moresjax.tuning.methods.boft import BOFT
from moresjax.tuning.methods.mixlora import MixLoRA
from moresjax.tuning.methods.oft import OFT
from moresjax.tuning.methods.oft_legacy import LegacyOFT
from moresjax.tuning.multi_adapter import stack_adapters

LLMS = ("phi-2", "vicuna-7b", "vicuna-13b")
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
# Every method on a linear of its own, and several on one.
MERGEABLE = (
    "lora:rank=2,rslora=true,alpha=3,targets=o/dora:rank=2,targets=q,layers=0;2/"
    "oft:block_size=4,targets=k/oft-legacy:blocks=2,targets=v,layers=1/"
    "boft:block_size=4,factors=2,targets=down/vera:rank=5,targets=up;gate,layers=0;1",
    "oft:block_size=4,cayley=exact,targets=q/dora:rank=2,targets=k/boft:targets=v/"
    "oft-legacy:blocks=4,targets=down/ia3:targets=q;k;v;down/lora:rank=2,targets=q;k;v;down",
)
MIXLORA = "mixlora:rank=2,factors=4,targets=o,conditional=true,scored=true"


def randomized(model, scale=0.3):
    """The model with noise on every tuning parameter."""
    rng = np.random.default_rng(1)
    flat = nnx.to_flat_state(nnx.state(model.tuning.params))
    noisy = [(p, x.replace(x.get_value() + scale * rng.standard_normal(x.shape))) for p, x in flat]
    nnx.update(model.tuning.params, nnx.from_flat_state(noisy))
    return model


@jax.jit
def forward(model, batch):
    return model.llm.logits(model(batch).hidden)


def logits(model, batch):
    return np.asarray(forward(model, batch))


@pytest.fixture(scope="module")
def batch():
    return tiny_batch(images=0)


@pytest.fixture(scope="module")
def base(batch):
    """Logits of the model without tuning, its linears with biases far from zero."""
    return logits(with_biases("none"), batch)


def with_biases(spec, **llm):
    model = tiny_model(spec, **BIASES, **llm)
    for linear in (model.llm.blocks.attn.q, model.llm.blocks.attn.k, model.llm.blocks.attn.v):
        values = np.random.default_rng(2).standard_normal(linear.bias.shape)
        linear.bias[...] = jnp.asarray(values, jnp.float32)
    return model


@pytest.mark.parametrize("spec", MERGEABLE)
def test_fresh_methods_start_at_the_base_model_and_merge_to_the_same_logits(spec, batch, base):
    model = with_biases(spec)
    np.testing.assert_allclose(logits(model, batch), base, atol=2e-6)
    tuned = logits(randomized(model), batch)
    assert np.abs(tuned - base).max() > 1e-2
    np.testing.assert_allclose(logits(merged(model), batch), tuned, atol=1e-5)


def test_encoder_and_connector_are_tuned_and_merged_as_the_llm_is():
    """Also where the encoder's last block is held apart; each adapter alone as among several."""
    config, batch = tiny_config(), tiny_batch()
    config = dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, feature_layer=-1, num_trainable_blocks=1)
    )
    spec = "lora:rank=2,targets=all;vision.all;connector.all/ia3:targets=vision.up;connector.1"
    model = initialize(MLLM(config, spec))
    assert {site for _, _, site in model.tuning._sites()} >= {"connector.0", "vision.block.down"}
    tuned, part = logits(randomized(model, 0.2), batch), {}
    for site in ("vision.block.q", "connector.0"):
        part[site] = nnx.clone(model)
        for leaf in part[site].tuning.params["lora"][site].values():
            leaf[...] = 0 * leaf[...]
        assert np.abs(logits(part[site], batch) - tuned).max() > 1e-4
    np.testing.assert_allclose(logits(merged(model), batch), tuned, atol=1e-5)
    several = nnx.clone(model)
    several.tuning = stack_adapters({"a": part["connector.0"].tuning, "b": model.tuning})
    chosen = dataclasses.replace(batch, adapter=np.ones(len(batch.tokens), np.int32))
    np.testing.assert_allclose(logits(several, chosen), tuned, atol=1e-5)


def test_mixlora_starts_at_the_base_model_and_cannot_be_merged(batch, base):
    model = with_biases(MIXLORA)
    np.testing.assert_allclose(logits(model, batch), base, atol=2e-6)
    assert np.abs(logits(randomized(model), batch) - base).max() > 1e-2
    with pytest.raises(UserError, match="mixlora cannot be merged"):
        merged(model)


def test_gradients_are_the_same_with_rematerialisation_and_reach_every_parameter(batch):
    gradients, spec = [], MERGEABLE[0].replace("lora:rank=2,rslora=true,alpha=3,targets=o", MIXLORA)
    for remat in (False, True):
        model = randomized(with_biases(spec, remat=remat))
        graphdef, trainable, frozen = split_model(model, ())

        def loss(trainable, graphdef=graphdef, frozen=frozen):
            return next_token(nnx.merge(graphdef, trainable, frozen), batch).total

        flat = nnx.to_flat_state(jax.jit(jax.grad(loss))(trainable))
        gradients.append({path: np.asarray(x.get_value()) for path, x in flat})
    for path, found in gradients[0].items():
        np.testing.assert_allclose(found, gradients[1][path], atol=1e-5, rtol=1e-4)
        _, _, key, site, leaf = path
        # Taking the best has no gradient; only the scores of A's router are used beyond it.
        learns = leaf not in ("router_b", "router_ab")
        for layer, on in enumerate(np.asarray(model.tuning.layer_masks[key][site][...])):
            assert (np.abs(found[layer]).max() > 0) == (on and learns), path


def test_shared_arrays_of_vera_neither_train_nor_count():
    model = tiny_model("vera:rank=5,targets=all")
    _, trainable, _ = split_model(model, ())
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)}
    assert all(name.startswith("tuning.params.vera.") for name in names)
    assert model.tuning.common("vera")["a"].shape == (24, 5)  # down has the widest input
    assert model.tuning.common("vera")["b"].shape == (5, 24)
    for other, same in (
        (tiny_model("vera:rank=5,targets=all", seed=3), True),
        (tiny_model("vera:rank=5,targets=all,seed=1"), False),
    ):
        equal = np.array_equal(other.tuning.common("vera")["a"], model.tuning.common("vera")["a"])
        assert equal == same


def cayley(skew):
    eye = np.eye(skew.shape[-1])
    return (eye - skew) @ np.linalg.inv(eye + skew)


def block_diagonal(blocks):
    return torch.block_diag(*map(torch.tensor, blocks)).numpy()


@dataclasses.dataclass
class Plain:
    """A linear as methods see it."""

    kernel: np.ndarray
    bias: np.ndarray | None = None

    def __post_init__(self):
        self.kernel = jnp.asarray(self.kernel)
        self.bias = None if self.bias is None else jnp.asarray(self.bias)

    def dense(self):
        return self.kernel

    def __call__(self, x):
        y = x @ self.kernel
        return y if self.bias is None else y + self.bias


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_legacy_oft_turns_the_output_before_the_bias():
    method = LegacyOFT(blocks=2)
    x, kernel, bias, matrix = random(3, 6), random(6, 8, seed=1), random(8, seed=2), random(2, 4, 4)
    skew = (matrix - matrix.swapaxes(1, 2)) / 2
    expected = x @ kernel @ block_diagonal(cayley(skew)) + bias
    params = method.prepare({"matrix": jnp.asarray(matrix)})
    found = method.apply(params, Plain(kernel, bias), jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_two_rotations_of_oft_are_inverse_to_first_order_and_orthogonal():
    vector = jnp.asarray(0.02 * random(2, 6))
    neumann, exact = (
        np.asarray(OFT(block_size=4, cayley=kind).prepare({"skew": vector})["rotation"])
        for kind in ("neumann", "exact")
    )
    assert np.abs(neumann - exact).max() > 0.05
    np.testing.assert_allclose(neumann, exact.swapaxes(1, 2), atol=1e-5)
    np.testing.assert_allclose(
        exact @ exact.swapaxes(1, 2), np.eye(4)[None].repeat(2, 0), atol=1e-6
    )


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_is_the_butterfly_of_peft(factors):
    features, size = 16, 4
    blocks = features // size
    matrix = random(factors, blocks, size, size)
    expected = np.eye(features)
    for number in range(factors):
        order = BOFTLayer.block_butterfly_perm(
            None, features, blocks // 2**number, size // 2, factors - 1
        )
        permute = BOFTLayer.perm2mat(None, order).numpy()
        turn = cayley((matrix[number] - matrix[number].swapaxes(1, 2)) / 2)
        expected = permute @ block_diagonal(turn) @ permute.T @ expected
    method = BOFT(block_size=size, factors=factors)
    params = {"matrix": jnp.asarray(matrix), "scale": jnp.asarray(random(5, seed=1))}
    x, kernel, bias = random(3, features, seed=2), random(features, 5, seed=3), random(5, seed=4)
    found = method.apply(method.prepare(params), Plain(kernel, bias), jnp.asarray(x))
    np.testing.assert_allclose(found, x @ expected @ kernel * params["scale"] + bias, atol=2e-5)


@pytest.mark.parametrize("conditional", [False, True])
def test_mixlora_chooses_factors_by_the_mean_of_an_examples_tokens(conditional):
    """Against the definition, one example at a time; padding has no say."""
    method = MixLoRA(factors=5, rank=2, conditional=conditional)
    params = method.initial(jax.random.key(0), 6, 4)
    params = {n: random(*x.shape, seed=i) for i, (n, x) in enumerate(params.items())}
    x, tokens, kernel = random(3, 7, 6), np.ones((3, 7), bool), random(6, 4, seed=9)
    tokens[1, 3:] = False
    linear = Plain(kernel)
    arrays = {n: jnp.asarray(v) for n, v in (params | {"tokens": tokens}).items()}
    found = np.asarray(method.apply(arrays, linear, jnp.asarray(x)))

    def softmax(scores):
        powers = np.exp(scores - scores.max())
        return powers / powers.sum()

    for row in range(3):
        mean = x[row][tokens[row]].mean(0)
        a = params["a"][np.argsort(-(mean @ params["router_a"]))[:2]]
        score = softmax(mean @ params["router_b"])
        for i in range(2 if conditional else 0):
            score = score + softmax(a[i] @ params["router_ab"][i])
        b = params["b"][np.argsort(-score)[:2]]
        expected = x[row] @ kernel + 10 / 2 * x[row] @ a.T @ b
        np.testing.assert_allclose(found[row], expected, atol=1e-4)


def test_dropout_of_dora_reaches_the_stretched_product_as_in_peft():
    """peft: y = W x + b + (m/|V| - 1) W drop(x) + m/|V| s B A drop(x)."""
    method = METHODS["dora"](rank=2, dropout=0.5)
    params = method.initial(jax.random.key(0), 6, 4)
    params = {n: jnp.asarray(random(*x.shape, seed=i)) for i, (n, x) in enumerate(params.items())}
    x, kernel, bias = jnp.ones((64, 6)), random(6, 4, seed=7), random(4, seed=8)
    key = jax.random.key(3)
    found = method.apply(params, Plain(kernel, bias), x, key)
    low = np.where(jax.random.bernoulli(key, 0.5, x.shape), 2.0, 0.0)
    added = method.scale * np.asarray(params["a"]) @ np.asarray(params["b"])
    magnitude = np.linalg.norm(kernel, axis=0) + np.asarray(params["longer"])
    stretch = magnitude / np.linalg.norm(kernel + added, axis=0)
    expected = x @ kernel + bias + (stretch - 1) * (low @ kernel) + stretch * (low @ added)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("oft:block_size=32", (None, 4096 // 32 * 496 * 3 * 32, None)),
        ("dora:rank=16", (None, 41_336_832, None)),
        ("lora:rank=16", (None, 39_976_960, None)),
        ("boft:block_size=4", (None, 1_310_720, None)),
        ("vera:rank=256", (None, 278_528, None)),
        ("ln", (None, (2 * 32 + 1) * 4096, (2 * 40 + 1) * 5120)),
        ("mixlora:factors=16", (None, 39_976_960 + 2 * 16 * 32 * (6 * 4096 + 11_008), None)),
    ],
)
def test_exact_counts(spec, expected):
    for llm, count in zip(LLMS, expected, strict=True):
        if count is not None:
            assert count_parameters(mllm_config(llm), spec, ()).trainable_in_llm == count


def trained(spec: str, **llm) -> set[str]:
    _, trainable, _ = split_model(tiny_model(spec, **llm), ())
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)}


def test_ln_trains_all_norms_of_the_llm_or_those_named_and_nothing_else():
    names = trained("ln")
    assert names == {"llm.norm.scale", "llm.blocks.attn_norm.scale", "llm.blocks.mlp_norm.scale"}
    names = trained("ln:targets=norm;q_norm;vision.mlp_norm", qk_norm=True)
    assert names == {
        "llm.norm.scale",
        "llm.blocks.attn.q_norm.scale",
        "vision.blocks.mlp_norm.scale",
        "vision.blocks.mlp_norm.bias",
    }


def test_parts_train_beside_other_methods_but_not_what_never_runs():
    assert trained("partial:train=embed/ln:targets=norm") == {"llm.embed.table", "llm.norm.scale"}
    names = trained("partial:train=biases", **BIASES)
    assert len(names) == 18
    assert {"llm.blocks.attn.q.bias", "connector.layers.1.bias", "vision.patch.bias"} <= names
    names = trained("partial:train=vision")
    assert {name.split(".")[0] for name in names} == {"vision"}
    assert not [name for name in names if name.startswith("vision.tail")]


def test_an_alpha_of_zero_is_a_scale_of_zero():
    for spec, scale in (("", 2.0), (",alpha=0.0", 0.0), (",alpha=2.0", 0.5)):
        tuning = Tuning(f"lora:rank=4{spec}", tiny_config())
        assert tuning.spec == f"lora:rank=4{spec}"
        assert tuning.methods[0][1].scale == scale


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("oft:block_size=4/boft", r"boft redefines the whole matrix of llm\.block\.q.* after oft"),
        ("lora/dora", r"dora redefines.* after lora"),
        ("full/oft:block_size=4", r"oft redefines.* after full"),
        ("full/full", r"full and full both train"),
        ("ln/full", r"ln and full both train"),
        ("oft:block_size=5", r"oft:block_size=5 does not divide the 16 of inputs of llm\.block\.q"),
        ("oft-legacy:blocks=16", r"blocks=16 does not divide the 8 of outputs of llm\.block\.k"),
        ("oft:cayley=fast", r"fast.*neumann, exact"),
        ("boft:block_size=3", r"even block_size.*got 3"),
        ("mixlora:rank=5,factors=4", r"rank=5 exceeds its factors=4"),
        ("vera:rank=0", r"rank must be at least 1"),
        ("lora:targets=q;connector.2", r"'connector\.2'.*all, q, .*vision\.all.*connector\.0"),
        ("mixlora:targets=connector.0", r"unknown target of mixlora 'connector\.0'"),
        ("lora:alpha=inf", r"lora:alpha must be a finite number, got inf"),
        ("ln:targets=q_norm", r"unknown target of ln 'q_norm'.*attn_norm, mlp_norm, norm"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(spec, message):
    with pytest.raises(UserError, match=message):
        Tuning(spec, tiny_config())


def test_methods_that_only_add_combine_with_everything():
    for spec in ("full/lora", "oft:block_size=4/lora", "dora/vera:rank=2", "lora/vera:rank=2"):
        assert Tuning(spec, tiny_config()).spec == spec
