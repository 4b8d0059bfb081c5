"""Hidden states while generating: those of one teacher-forced pass, and those of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from moresjax.analysis.capture import (
    OutputProbe,
    StateProbe,
    Take,
    answer_states,
    begins_word,
    word_ids,
)
from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.generation.engine import Engine
from moresjax.inference.model import Model
from moresjax.testing.batches import tiny_batch
from moresjax.testing.hf_llavas import NEW, PAD, Case, case_of
from moresjax.testing.models import (
    digits_processor,
    randomised_tuning,
    talking_model,
    tiny_model,
)
from moresjax.tuning.probes import ChosenToken

SITES = (
    "llm.embed.out",
    "llm.block.out",
    "llm.block.attn.out",
    "llm.block.mlp.out",
    "llm.norm.out",
)
IMAGES = np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3)).astype(np.uint8)
PROMPTS = [
    ("is there a two ?", []),
    ("what is at top-left ?", [IMAGES[1]]),
    ("<image> the largest ? <image> the same ?", [IMAGES[0], IMAGES[1]]),
]
ITEMS = [{"prompt": text, "images": images} for text, images in PROMPTS]
CALLBACK = "callback"  # what programs call that ask the host
LIMIT, TUNING = 5, "prompt:length=2/lora:rank=2"


@pytest.fixture(scope="module")
def model() -> Model:
    """A model that answers with several words, whose activations are of the order of one."""
    mllm = tiny_model(TUNING, vocab_size=37, num_layers=2)
    rng = np.random.default_rng(3)
    for parameter in (mllm.llm.embed.table, mllm.llm.head.kernel):
        parameter[...] = rng.standard_normal(parameter.shape).astype(np.float32)
    return Model(randomised_tuning(mllm), digits_processor())


@pytest.fixture(scope="module")
def word(model) -> str:
    """The second word of the first answer."""
    return model.generate(*PROMPTS[0], max_new_tokens=LIMIT, batch_size=4).split()[1]


@pytest.fixture(scope="module")
def run(model, word):
    """A generation that is read in every way, and what one pass over prompts and answers gives."""
    ids = word_ids(model.prompts.tokenizer, [word])
    probes = [StateProbe(site, None, "each") for site in SITES]
    probes += [StateProbe(take=take, layers=(1,)) for take in ("prompt", "answer")]
    probes.append(StateProbe(take="token", layers=(1,), ids=ids, candidates=2))
    rows = [model.prompt(*prompt) for prompt in PROMPTS]
    done = model.service.generate_rows(rows, LIMIT, probes)
    tokens = [np.asarray(done.tokens)[n, : done.length[n]] for n in range(len(rows))]
    whole = [row.append(ids) for row, ids in zip(rows, tokens, strict=True)]
    batch = model.service.batch(whole, max(map(len, whole)))
    outputs = tuple(OutputProbe(site) for site in SITES)
    stats = nnx.jit(lambda module, batch: module(batch, probes=outputs).stats)(model.mllm, batch)
    # Two virtual tokens pass through the blocks before the others; after the norm they are gone.
    forced = {p.site: np.asarray(stats[p.name])[:, :, 2:] for p in outputs}
    first = [len(row) - 1 for row in rows]
    expected = [
        {site: h[:, n, first[n] : first[n] + len(ids)] for site, h in forced.items()}
        for n, ids in enumerate(tokens)
    ]
    found = {probe: jax.tree.map(np.asarray, done.stats[probe.name]) for probe in probes}
    return found, expected, tokens


def test_states_while_generating_are_those_of_one_teacher_forced_pass(run):
    found, expected, tokens = run
    assert len({tuple(ids) for ids in tokens}) == len(PROMPTS)
    for probe, stats in found.items():
        for number, ids in enumerate(tokens if probe.take == "each" else []):
            own = expected[number][probe.site]
            assert stats["count"][0, number] == len(ids)
            close(stats["state"][:, number, : len(ids)], own)
            assert not stats["state"][:, number, len(ids) :].any()


def test_reduced_states_are_those_of_all_tokens(model, run, word):
    found, expected, tokens = run
    by_take = {probe.take: stats for probe, stats in found.items() if probe.take != "each"}
    for number, ids in enumerate(tokens):
        own, ends = expected[number]["llm.block.out"][1], np.isin(ids, model.processor.eos_ids)
        stats = jax.tree.map(lambda x, n=number: x[:, n], by_take)
        (prompt,) = answer_states(stats["prompt"], Take("prompt"), bool)
        close(prompt.state[0], own[0])
        (answer,) = answer_states(stats["answer"], Take("answer"), bool)
        close(answer.state[0], own[~ends].mean(0))
        assert answer.count == (~ends).sum()
        words = [model.prompts.spell([i]) for i in ids.tolist()]
        (token,) = answer_states(stats["token"], Take("token", (word,)), lambda _: True)
        assert token.found == (word in words)
        if token.found:
            assert token.place == words.index(word)
            close(token.state[0], own[token.place])
        (none,) = answer_states(stats["token"], Take("token", (word,)), lambda _: False)
        assert (none.found, none.count, none.state.any()) == (False, 0, False)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_an_end_token_is_no_part_of_an_answer():
    token = ChosenToken(jnp.array([3, 1, 1]), jnp.zeros(3, int), *map(jnp.array, ENDED), 4)
    probe, new = StateProbe(take="answer"), jnp.ones((2, 3, 4))
    first = probe.fold(None, new, token)
    again = probe.fold(first, 2 * new, token)
    np.testing.assert_array_equal(again["count"], [[2, 0, 0]])
    np.testing.assert_array_equal(again["state"][:, :, 0], [[3, 0, 0]] * 2)
    (found,) = answer_states(jax.tree.map(lambda x: x[:, 1], again), Take("answer"), bool)
    assert (found.found, found.count) == (False, 0)


ENDED = [[True, True, False], [False, True, False]]  # alive, and given an end token


def test_image_sites_give_means_over_the_images_of_a_prompt(model):
    sites = "connector.out", "vision.block.out"
    rows = [model.prompt(*prompt) for prompt in PROMPTS]
    batch = model.service.batch(rows, max(map(len, rows)))
    outputs = tuple(OutputProbe(site) for site in sites)
    stats = nnx.jit(lambda module, batch: module(batch, probes=outputs).stats)(model.mllm, batch)
    probes = tuple(StateProbe(site, None if n == 0 else (0,)) for n, site in enumerate(sites))
    done = model.service.generate_many(rows, 1, batch_size=3, probes=probes)
    for output, probe in zip(outputs, probes, strict=True):
        tokens = np.asarray(stats[output.name])[0].reshape(3, 2, -1, 16 if not probe.layers else 8)
        tokens = tokens[:, :, -9:]  # the class token is no patch
        expected = [0 * tokens[0, 0, 0], tokens[1, 0].mean(0), tokens[2].mean((0, 1))]
        found = [one.stats[probe.name]["state"][0] for one in done]
        close(found, expected)


@pytest.fixture(scope="module")
def llava() -> Case:
    return case_of("llama + clip")


@pytest.fixture(scope="module")
def read(llava):
    """Tokens, states of a block and means of an answer, of prompts in a batch of some form."""
    probes = StateProbe("llm.block.out", (0,), "each"), StateProbe("llm.norm.out", None, "answer")
    engine = Engine(llava.model, eos_ids=(-1,), probes=probes)

    @functools.cache
    def generated(**options):
        done = engine.generate(llava.batch(**options), NEW)
        states = (np.asarray(done.stats[probe.name]["state"]) for probe in probes)
        return np.asarray(done.tokens), *states

    return generated


def test_states_depend_on_neither_padding_nor_the_batch(read):
    tokens, block, answer = read(left=True, extra=3)
    for options, rows in (({"left": False, "extra": 3}, slice(None)), ({"chosen": (1,)}, [1])):
        own = read(**options)
        np.testing.assert_array_equal(own[0], tokens[rows])
        close(own[1], block[:, rows])
        close(own[2], answer[:, rows])


@pytest.mark.parametrize("left", [True, False])
def test_states_are_those_of_transformers(llava, read, left):
    tokens, block, answer = read(left=left, extra=3)
    ids, mask, pixels = (torch.tensor(x) for x in llava.arrays())
    with torch.no_grad():
        oracle = llava.oracle.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=PAD,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    np.testing.assert_array_equal(tokens, oracle.sequences[:, ids.shape[1] :])
    first, last = (
        np.stack([step[layer][:, -1].numpy() for step in oracle.hidden_states], 1)
        for layer in (1, -1)
    )
    np.testing.assert_allclose(block[0], first, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(answer[0] / NEW, last.mean(1), atol=1e-4, rtol=1e-4)


def test_layers_that_are_not_chosen_and_states_of_prompts_cost_nothing():
    model, batch = tiny_model(), tiny_batch(answer=0)

    def flops(*probes: StateProbe) -> float:
        engine = Engine(model, eos_ids=(1,), probes=probes)
        lowered = engine.lower_decode(batch, 3)
        assert CALLBACK not in lowered.as_text()  # states stay on the device
        return lowered.compile().cost_analysis()["flops"]

    bare = flops()
    assert flops(StateProbe(take="prompt")) == bare
    assert bare < flops(StateProbe(layers=(2,), take="answer")) < 1.01 * bare
    told = jax.jit(lambda x: jax.debug.callback(print, x)).lower(1.0)
    assert CALLBACK in told.as_text()


def test_whole_words_are_told_from_their_beginnings():
    pieces = ["yes", " yes", "terday", " No", ",", " no", "body"]

    def spell(ids):
        return "".join(pieces[i] for i in ids)

    assert begins_word(spell, [0], 0, ["yes"])
    assert not begins_word(spell, [0, 2], 0, ["yes"])
    assert begins_word(spell, [3, 4, 1], 0, ["no"])
    assert begins_word(spell, [3, 4, 1], 2, ["YES"])
    assert not begins_word(spell, [5, 6], 0, ["no"])
    assert begins_word(spell, [5, 6], 0, ["no", "nobody"])
    assert not begins_word(spell, [6, 0], 1, ["yes"])
    tokenizer = talking_model().prompts.tokenizer
    assert word_ids(tokenizer, ["two"]) == (tokenizer.convert_tokens_to_ids("two"),)
    assert Take.parse("token( yes ; no)").words == ("yes", "no")
    assert Take.parse("token", ["a"]) == Take("token", ("a",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "llm.block.q"}, "unknown site 'llm.block.q'; choose from: "),
        ({"layers": 2}, r"llm.block.out has layers 0 to 1, got \[2\]"),
        ({"layers": "5"}, "5"),
        ({"take": "last"}, "unknown take 'last'"),
        ({"take": "token()"}, "take=token needs words"),
        ({"take": "token(zebra)"}, "has no tokens for the word 'zebra'"),
        ({"take": "token(two)", "match": "exact"}, "unknown match 'exact'"),
        ({"take": "answer", "site": "connector.out"}, "take=prompt"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_read_is_told(model, options, message):
    with pytest.raises(UserError, match=message):
        model.states(["is there a two ?"], **options)


def test_items_are_checked(model):
    with pytest.raises(UserError, match="two items have the id 'a'"):
        model.states([{"prompt": "two ?", "id": "a"}] * 2)
    with pytest.raises(UserError, match="unknown field of item 0 'question'; choose from: id"):
        model.states([{"question": "two ?"}])
    with pytest.raises(UserError, match="item 0 needs a prompt"):
        model.states([{"id": "a"}])
    with pytest.raises(UserError, match="no item"):
        model.states([])


def test_states_that_are_no_numbers_are_refused():
    model = talking_model()
    table = model.mllm.llm.embed.table
    table[...] = jnp.full_like(table[...], jnp.nan)
    with pytest.raises(UserError, match=r"the state of item 0 at llm\.block\.out 1 is not finite"):
        model.states(["two ?"], layers=1)


def test_a_folder_goes_on_where_it_stopped(model, run, word, tmp_path, monkeypatch):
    items = [item | {"answers": ["yes"], "metadata": {"type": "x"}} for item in ITEMS]
    options = {"layers": 1, "take": f"token({word.upper()};never)", "max_new_tokens": LIMIT}
    options |= {"batch_size": 2, "match": "first-token"}
    with pytest.raises(UserError, match="has no tokens for the word 'never'"):
        model.states(items, **options)
    options["take"] = f"token({word.upper()})"
    whole = model.states(items, **options)
    assert whole.index[0]["found"]
    assert model.prompts.spell(run[2][0][[whole.index[0]["place"]]]) == word
    assert whole.index[0]["prediction"].split()[1] == word
    out = tmp_path / "s"
    stream, asked = model.service.stream, []

    def interrupted(rows, *args, **options):
        asked.append(len(rows))
        for count, found in enumerate(stream(rows, *args, **options)):
            if count == 1 and len(asked) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(model.service, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.states(items, out=out, **options)
    assert len(States(out)) == 1
    states = model.states(items, out=out, **options)
    assert asked == [3, 2]
    assert sorted(states.ids) == whole.ids
    order = [states.ids.index(name) for name in whole.ids]
    close(states.take(order).matrix(), whole.matrix())
    assert states.take(order).index == whole.index
    assert whole.index[2]["metadata"] == {"type": "x"}
    assert len(whole.index[2]["images"]) == 2
    assert states.meta["model"] == model.fingerprint
    with pytest.raises(UserError, match="holds states with layers="):
        model.states(items, **options | {"layers": 0, "out": out})
