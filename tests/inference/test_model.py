"""The public face of a model: what calls take and give, what reading costs, what it tells."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import moresjax as mj
from moresjax.core.errors import UserError
from moresjax.generation import programs
from moresjax.inference.model import Model
from moresjax.sharding.mesh import make_mesh
from moresjax.testing.models import talking_model
from moresjax.weights.adapter import save_adapter

NEW = 3
PHOTOS = list(np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3)).astype(np.uint8))
ASKED = ["is there a two ?", "what is the largest ?"]


@pytest.fixture(scope="module")
def model() -> Model:
    return talking_model("mores:rank=1")


@pytest.fixture(scope="module")
def answers(model) -> list[str]:
    """With a list of images for every prompt, as it always was."""
    return model.generate(ASKED, [[PHOTOS[0]], [PHOTOS[1]]], max_new_tokens=NEW)


@pytest.fixture
def path(tmp_path) -> str:
    Image.fromarray(PHOTOS[1]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_one_image_per_prompt_is_a_list_of_one(model, answers, path):
    for second in (PHOTOS[1], Image.fromarray(PHOTOS[1]), path, str(path), path.read_bytes()):
        found = model.generate(ASKED, [PHOTOS[0], second], max_new_tokens=NEW)
        assert found == answers
    assert model.generate(ASKED, [jax.numpy.asarray(x) for x in PHOTOS], max_new_tokens=NEW) == (
        answers
    )


def test_a_single_prompt_takes_an_image_or_a_list_and_gives_one_answer(model, answers):
    for images in (PHOTOS[0], [PHOTOS[0]], (PHOTOS[0],)):
        assert model.generate(ASKED[0], images, max_new_tokens=NEW) == answers[0]
    pair = model.generate(ASKED[0], PHOTOS, max_new_tokens=NEW)
    assert [pair] == model.generate(ASKED[:1], [PHOTOS], max_new_tokens=NEW)


def test_scores_logits_rows_and_chats_take_images_alike(model):
    words = ["two .", "no ."]
    (expected,) = model.score(ASKED[:1], [words], [[PHOTOS[0]]])
    assert model.score(ASKED[0], words, PHOTOS[0]) == expected
    assert model.score(ASKED[:1], [words], PHOTOS[:1]) == [expected]
    logits = model.logits(ASKED[0], PHOTOS[0])
    assert logits.shape[0] == 1
    np.testing.assert_array_equal(logits, model.logits(ASKED[:1], [[PHOTOS[0]]]))
    rows = [model.prompt(ASKED[0], images) for images in (PHOTOS[0], [PHOTOS[0]])]
    np.testing.assert_array_equal(*(row.tokens for row in rows))
    said = [
        "".join(mj.Chat(model, max_new_tokens=NEW).ask(ASKED[0], x))
        for x in (PHOTOS[0], PHOTOS[:1])
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (ASKED, np.stack(PHOTOS), "2 prompts need a list with the images of each, got a ndarray"),
        (ASKED[0], np.stack(PHOTOS), r"an array uint8\[2, 12, 12, 3\]; an image is a uint8 array"),
        (ASKED[0], [PHOTOS], "the images of the prompt are nested too deeply"),
        (ASKED, [PHOTOS, [PHOTOS]], "the images of prompt 1 are nested too deeply"),
        (ASKED, PHOTOS[:1], "2 prompts but 1 entries of images"),
        (ASKED, "photo.png", "2 prompts need a list with the images of each, got a str"),
        (ASKED[0], PHOTOS[0].astype(np.float32), r"an array float32\[12, 12, 3\]"),
        (ASKED[0], 7, "an image of the prompt is of type int"),
        (ASKED[0], "photo.png", "photo.png does not exist"),
    ],
)
def test_images_that_could_mean_several_things_are_refused(model, prompts, images, message):
    with pytest.raises(UserError, match=message):
        model.generate(prompts, images, max_new_tokens=NEW)
    if isinstance(prompts, str):
        with pytest.raises(UserError, match=message.replace("the prompt", "the question")):
            next(mj.Chat(model).ask(prompts, images))


def test_nothing_asked_is_nothing_answered(model):
    assert model.generate([]) == model.generate([], []) == model.score([], []) == []
    assert model.generate([], details=True) == []
    for arguments, message in (({"prompts": []}, "at least one prompt"), ({}, "or input_ids")):
        with pytest.raises(UserError, match=message):
            model.logits(**arguments)


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        (ASKED[0], "two .", "must be a list of texts, got a single text"),
        (ASKED, ["two .", "no ."], "2 prompts need a list of answers each, got a list of texts"),
        (ASKED, [["two ."]], "2 prompts but 1 lists of answers"),
        (ASKED[0], [["two ."]], "an answer to score must be a text"),
        (ASKED[0], [" "], "an answer to score is empty"),
    ],
)
def test_answers_that_belong_to_no_prompt_are_refused(model, prompts, continuations, message):
    with pytest.raises(UserError, match=message):
        model.score(prompts, continuations)


def test_details_have_tokens_probabilities_and_the_reason_to_stop(model, answers):
    options = {"details": True, "logprobs": True, "max_new_tokens": 20}
    whole = model.generate(ASKED[0], PHOTOS[0], **options)
    assert whole.text == model.generate(ASKED[0], PHOTOS[0], max_new_tokens=20)
    assert whole.stop_reason in ("eos", "length")
    assert whole.tokens.shape == whole.logprobs.shape
    # The same tokens, scored.
    row = model.prompt(ASKED[0], PHOTOS[0])
    (score,) = model.service.score_rows([(row, whole.tokens)])
    assert whole.logprobs.sum() == pytest.approx(score.logprob, abs=1e-3)
    assert whole.text.startswith(answers[0])
    short = model.generate(ASKED[0], PHOTOS[0], details=True, max_new_tokens=2)
    assert (short.stop_reason, len(short.tokens), short.logprobs) == ("length", 2, None)


def test_a_stop_string_and_an_end_token_are_told_apart(model):
    whole = model.generate(ASKED[0], PHOTOS[0], details=True, max_new_tokens=20)
    words = whole.text.split()
    (stopped,) = model.generate(
        ASKED[:1], PHOTOS[:1], details=True, max_new_tokens=20, stop=words[1]
    )
    assert stopped.stop_reason == "stop"
    assert words[1] not in stopped.text.split()
    assert model.prompts.spell(stopped.tokens).split()[-1] == words[1]
    end = model.processor.eos_ids[0]
    answer = model.prompts.answer([*map(int, whole.tokens[:3]), end])
    assert (answer.stop_reason, len(answer.tokens)) == ("eos", 4)


def test_probabilities_of_a_text_are_refused(model):
    with pytest.raises(UserError, match="logprobs=True needs details=True"):
        model.generate(ASKED, logprobs=True)


def compiled() -> list[int]:
    """How many programs of each kind there are."""
    found = [value for value in vars(programs).values() if hasattr(value, "_cache_size")]
    assert len(found) >= 4
    return [program._cache_size() for program in found]


def test_reading_a_model_costs_no_engine(model, answers, tmp_path):
    options = {"max_new_tokens": NEW}
    engine, before = model.service.engine(), compiled()
    assert model.mllm is model.mllm
    assert (model.tuning, model.config, model.adapters) == ("mores", model.mllm.config, ())
    assert len(model.fingerprint) == 12
    assert "tuning: mores" in repr(model)
    mj.Chat(model)
    model.logits(ASKED[0])
    save_adapter(model.mllm, tmp_path, also_train=("connector",))
    assert model.generate(ASKED, PHOTOS, **options) == answers
    assert model.service.engine() is engine
    assert compiled() == before
    model.score(ASKED[0], ["two ."])
    assert model.service.engine() is engine


def test_a_changed_tuning_ends_the_engines():
    model = talking_model()
    base = model.generate(ASKED, PHOTOS, max_new_tokens=NEW)
    chat = mj.Chat(model, max_new_tokens=NEW)
    "".join(chat.ask(ASKED[0], PHOTOS[0]))
    engine = model.service.engine()
    model.attach("loreft:rank=1,positions=all")
    params = model.mllm.tuning.params["loreft"]["llm.block.out"]
    for leaf in params.values():
        leaf[...] = 3 * jax.numpy.ones_like(leaf[...])
    assert model.generate(ASKED, PHOTOS, max_new_tokens=NEW) != base
    assert model.service.engine() is not engine
    # A conversation goes on with what the model is now.
    said = "".join(chat.ask(ASKED[1]))
    assert chat.tokens_read > 20
    model.attach("none")
    assert model.generate(ASKED, PHOTOS, max_new_tokens=NEW) == base
    assert said == chat.turns[-1].answer


def test_one_name_chooses_the_adapter_of_all_prompts(tmp_path):
    model = talking_model()
    for number, name in enumerate(("one", "two")):
        model.attach("lora:rank=2", seed=number)
        params = model.mllm.tuning.params["lora"]
        for site in params.values():
            site["b"][...] = site["b"][...] + number
        save_adapter(model.mllm, tmp_path / name)
    model.load_adapters({name: tmp_path / name for name in ("one", "two")})
    assert model.adapters == ("one", "two")
    found = model.generate(ASKED, adapters=["two", "two"], max_new_tokens=NEW)
    assert model.generate(ASKED, adapters="two", max_new_tokens=NEW) == found
    with pytest.raises(UserError, match="unknown adapter 'three'"):
        model.generate(ASKED[0], adapters="three")
    assert "adapters: one, two" in repr(model)


def test_a_model_tells_its_parts_its_tuning_and_its_mesh(model):
    lines = repr(model).splitlines()
    assert lines[0] == "Model"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "llm",
        "vision",
        "connector",
        "tuning",
    ]
    assert lines[-1] == "  tuning: mores, 66 trainable parameters"
    sharded = talking_model()
    sharded.shard(make_mesh())
    assert repr(sharded).splitlines()[-1] == "  mesh: data=8 x fsdp=1 x tensor=1, cpu"


def test_treescope_shows_the_module(model):
    import treescope  # flax brings it

    shown = treescope.render_to_text(model)
    assert shown.startswith("Model(")
    assert "mores" in shown


def test_a_run_loads_with_another_tuning():
    run = Path(__file__).parents[1] / "fixtures" / "v0_1" / "mores"
    assert mj.load(run).tuning == "mores:positions=image"
    assert mj.load(run, tuning="lora:rank=2").tuning == "lora:rank=2"
    assert mj.load(run, tuning="none").tuning == "none"
