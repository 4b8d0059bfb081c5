"""Steering runs: vectors per row against one model each, first tokens from states, and tasks."""

import itertools
import json

import numpy as np
import pytest

import moresjax.inference.service as service
from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Example
from moresjax.evaluation.metrics.vqa import vqa_accuracy
from moresjax.evaluation.scoring import caption_scorer, example_scorer
from moresjax.evaluation.steering.ask import Trial
from moresjax.evaluation.steering.run import BASELINE, steer
from moresjax.evaluation.steering.tasks import (
    SteeringTask,
    parse_steering_task,
    split_states,
    steering_task,
)
from moresjax.evaluation.tasks import BenchmarkTask, limit_answers
from moresjax.generation import programs
from moresjax.inference.model import Model
from moresjax.inference.steering import first_tokens
from moresjax.testing.models import talking_model

RNG = np.random.default_rng(0)
IMAGES = [*RNG.integers(0, 255, (2, 12, 12, 3)).astype(np.uint8)]
QUESTIONS = [
    Example(f"{n}", f"<image>\n{text}", "seven", (IMAGES[n % 2],))
    for n, text in enumerate(["how many ?", "what is the largest ?", "is there a two ?", "two ?"])
]
TASK = BenchmarkTask("questions", QUESTIONS, max_new_tokens=3)
VECTORS = 300_000 * RNG.standard_normal((2, 16)).astype(np.float32)
TRIALS = [
    Trial("a", VECTORS[0], 1),
    Trial("a", VECTORS[0], 1, alpha=0.0),
    Trial("b", VECTORS[1], 0, alpha=-2.0),
]
STEERING = parse_steering_task("answers:yes>seven")


def answers_of(model: Model, trial: Trial | None = None) -> list[str]:
    """The answers of a model, which has a single vector where there is a trial."""
    if trial is not None:
        model.set(vector=trial.rows(2), alpha=1.0)
    images = [example.images[0] for example in QUESTIONS]
    return model.generate([e.prompt for e in QUESTIONS], images, max_new_tokens=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    found, out = [], tmp_path_factory.mktemp("steer")
    with pytest.MonkeyPatch.context() as patch:
        real = service.find_shared_prefixes

        def spy(*args, **options):
            found.append(real(*args, **options))
            return found[-1]

        patch.setattr(service, "find_shared_prefixes", spy)
        model = talking_model()
        result = steer(model, [TASK], TRIALS, STEERING, batch_size=4, out=out)
    return model, result, out, found


def test_every_vector_answers_as_if_it_were_alone_and_strength_zero_as_none(run):
    model, result, _, _ = run
    answers = result.answers["questions"]
    assert answers[BASELINE] == answers_of(talking_model())
    alone = talking_model(TRIALS[0].spec)
    for trial in (TRIALS[0], TRIALS[2]):
        assert answers[trial.key] == answers_of(alone, trial)
    assert answers[TRIALS[1].key] == answers[BASELINE]
    assert result.row("a", alpha=0.0)["changed"] == 0
    assert result.row("a", alpha=1.0)["changed"] > 0
    assert (model.tuning, model.adapters) == ("none", ())


def test_questions_are_read_once_for_all_vectors(run):
    model, _, _, found = run
    (shared,) = (own for own in found if own.rows)
    prompts = [model.prompts.row(e.prompt, e.images) for e in QUESTIONS]
    assert [len(row) for row in shared.rows] == [len(row) - 1 for row in prompts]
    assert len(shared.prefix_index) == len(QUESTIONS) * (len(TRIALS) + 1)


def test_all_vectors_and_strengths_are_one_program(run):
    model, result, *_ = run
    kinds = [value for value in vars(programs).values() if hasattr(value, "_cache_size")]

    def sizes() -> list[int]:
        return [kind._cache_size() for kind in kinds]

    before = sizes()
    assert max(before) > 0
    others = [Trial(f"v{n}", -n * VECTORS[n % 2], n % 2, alpha=n / 2) for n in range(3)]
    found = steer(model, [TASK], others, STEERING, batch_size=4)
    assert found.answers["questions"] != result.answers["questions"]
    assert sizes() == before


def test_numbers_and_answers_are_written_and_a_killed_run_goes_on(run, monkeypatch):
    model, result, out, _ = run
    saved = json.loads((out / "steering.json").read_text())
    assert saved["rows"] == json.loads(json.dumps(result.rows))
    assert saved["model"] == model.fingerprint
    log = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert len(log) == len(QUESTIONS) * (len(TRIALS) + 1)
    (out / "predictions.jsonl").write_text("".join(log[:-3]) + log[-3][:20])
    asked = []
    real = service.GenerationService.generate_many

    def spy(self, rows, *args, **options):
        asked.append(len(rows))
        return real(self, rows, *args, **options)

    monkeypatch.setattr(service.GenerationService, "generate_many", spy)
    whole = steer(talking_model(), [TASK], TRIALS, STEERING, batch_size=4, out=out)
    assert (whole.answers, whole.rows, asked) == (result.answers, result.rows, [3])
    again, fresh = [], limit_answers([TASK], 2)

    def ask(model, task, trials, *, pending, on_done, **options):
        found = itertools.product(task.examples, (None, *trials))
        again.extend(pair for pair in found if pending(*pair))
        for example, trial in again:
            on_done(example, trial, "two")

    monkeypatch.setattr("moresjax.evaluation.steering.run.ask_steered", ask)
    steer(talking_model(), [TASK], TRIALS, STEERING, out=out)
    assert again == []
    steer(talking_model(), fresh, TRIALS, STEERING, out=out)  # answers of another length are others
    assert len(again) == len(log)
    other = [Trial("a", VECTORS[1], 1)]
    with pytest.raises(UserError, match="holds answers of another model or vector"):
        steer(talking_model(), [TASK], other, STEERING, out=out)


def test_a_model_keeps_its_own_tuning_while_it_is_steered():
    model, trial = talking_model("red"), TRIALS[0]
    answers = steer(model, [TASK], [trial], STEERING, batch_size=4).answers["questions"]
    assert model.tuning == "red"
    alone = talking_model(f"red/{trial.spec}")
    assert answers[BASELINE] == answers_of(alone)
    assert answers[trial.key] == answers_of(alone, trial) != answers[BASELINE]


@pytest.mark.parametrize(("site", "layer"), [("llm.block.out", 1), ("llm.norm.out", 0)])
def test_first_tokens_follow_from_states_at_the_end_of_the_llm(site, layer):
    model = talking_model()
    items = [{"prompt": e.prompt, "images": e.images} for e in QUESTIONS]
    states = model.states(items, site=site, take="prompt", batch_size=4).matrix(site, layer)
    word = model.prompts.tokenizer.convert_tokens_to_ids("seven")
    head = model.mllm.llm.head
    assert head is not None
    vector = 20 * np.asarray(head.kernel[:, word])
    trial = Trial("a", vector, layer, site=site)
    found = steer(model, [TASK], [trial], STEERING, batch_size=4).answers["questions"]
    vectors = np.stack([vector, 0 * vector])
    tokens = first_tokens(model, states, vectors, site=site)
    for row, key in zip(tokens, (trial.key, BASELINE), strict=True):
        said = [model.prompts.spell([int(token)]).strip() for token in row]
        first = [text.split(" ")[0] for text in found[key]]
        # Answers leave special tokens out.
        assert [a for a in said if a] == [b for a, b in zip(said, first, strict=True) if a]
        assert sum(map(bool, said)) >= 3
    with pytest.raises(UserError, match=r"not from llm\.block\.attn\.out"):
        first_tokens(model, states, vectors, site="llm.block.attn.out")
    with pytest.raises(UserError, match="states of 16 and vectors of 3 features"):
        first_tokens(model, states, vectors[:, :3])


def test_vqa_accuracy_also_comes_as_it_was_published():
    questions = [
        Example("1", "two ?", ["2"] * 10, metadata={"answer_type": "number"}),
        Example("2", "red ?", ["yes"] * 10, metadata={"answer_type": "yes/no"}),
    ]
    task = BenchmarkTask(
        "vqa", questions, max_new_tokens=2, scorer=example_scorer(vqa_accuracy, name="VQA accuracy")
    )
    result = steer(talking_model(), [task], [], STEERING)
    counts = STEERING.metrics(questions, ["2", "blue"], ["yes", "yes"])["answer_types"]
    assert counts == {"number": [1, 0], "yes/no": [0, 2], "unrecognised": [1, 0]}
    trained = parse_steering_task("answers:yes>seven")
    trained.learn(rows("x", answers="seven", metadata={"answer_type": "number"}))
    trained.learn_types([Example("t", "?", "blue", metadata={"answer_type": "other"})])
    counts = trained.metrics(questions, ["2", "blue"], ["yes", "seven"])["answer_types"]
    assert counts == {"other": [1, 0], "unrecognised": [1, 2]}
    assert result.row(BASELINE)["matches_of_three"] == {
        "number": 0.0,
        "yes/no": 0.0,
        "mean_over_types": 0.0,
    }


def test_several_tasks_are_also_counted_together(run):
    model, result, *_ = run
    halves = [BenchmarkTask(f"half{n}", QUESTIONS[n::2], max_new_tokens=3) for n in (0, 1)]
    found = steer(model, halves, TRIALS[:1], STEERING, batch_size=4)
    assert [row["task"] for row in found.rows] == ["half0"] * 2 + ["half1"] * 2 + ["all"] * 2
    whole = [row | {"task": "all"} for row in result.rows[:2]]
    assert found.overall == whole
    assert result.overall == result.rows


def rows(*predictions: str, **fields) -> list[dict]:
    return [{"prediction": text, **fields} for text in predictions]


def store(index: list[dict]) -> States:
    return States.from_arrays({("llm.block.out", 1): np.eye(len(index), 4)}, index)


def test_states_are_chosen_by_what_was_answered():
    index = rows("Yes.", "no", "2", "yes") + rows("yes", found=False)
    source, target = split_states(store(index), parse_steering_task("answers:yes>no;two"))
    assert [row["prediction"] for row in source.index] == ["Yes.", "yes"]
    assert [row["prediction"] for row in target.index] == ["no", "2"]
    with pytest.raises(UserError, match="none of the 5 states is the target's of yes>red"):
        split_states(store(index), parse_steering_task("answers:yes>red"))


def test_answer_types_come_from_the_true_answers_of_the_states_questions():
    index = rows("x", answers=["two", "2"], metadata={"answer_type": "number"})
    index += rows("y", answers="red", metadata={"answer_type": "other"})
    task = parse_steering_task("answer_type:number")
    source, target = split_states(store(index), task)
    assert [r["prediction"] for r in source.index] == ["y"]
    assert [r["prediction"] for r in target.index] == ["x"]
    assert task.is_target("Two")
    assert task.is_source("blue")
    found = task.metrics([], ["red", "blue"], ["2", "red"])["answer_types"]
    assert found == {"number": [0, 1], "other": [1, 1], "unrecognised": [1, 0]}
    with pytest.raises(UserError, match="answer type 'colour'; choose from: number, other"):
        parse_steering_task("answer_type:colour").learn(index)


def test_captions_are_steered_to_words_and_away_from_genders():
    style = parse_steering_task("style:colors")
    assert style.is_target("A red bus.")
    assert style.source_state({"prediction": "a red bus"})
    found = style.metrics([], ["a bus"], ["a red bus, red"])
    assert (found["captions"], found["words"]) == ([0, 1], [0, 2])
    assert parse_steering_task("style:dog;cat").is_target("a cat")

    gender = parse_steering_task("gender")
    assert gender.is_source("A woman rides")
    assert gender.is_target("A person rides")
    assert not gender.is_target("A man and a person")
    examples = [
        Example("1", "", ["a person", "someone rides"]),
        Example("2", "", ["a woman", "a lady", "a person"]),
    ]
    found = gender.metrics(examples, ["a man", "a woman"], ["a person", "a person"])
    assert (found["male"], found["female"], found["neutral"]) == ([1, 0], [1, 0], [0, 2])
    assert (found["gender_open"], found["invented"]) == (1, [1, 0])


def test_a_style_costs_cider_in_its_strength():
    """Words of the list go up, CIDEr by the model's own captions goes down."""
    model, image = talking_model(), IMAGES[0]
    prompts = ["how many ?", "is there a two ?", "what is the largest ?"]
    said = model.generate(prompts, [[image]] * 3, max_new_tokens=4)
    examples = [
        Example(text, text, [own], (image,)) for text, own in zip(prompts, said, strict=True)
    ]
    task = BenchmarkTask("captions", examples, max_new_tokens=4, scorer=caption_scorer)
    word = model.prompts.tokenizer.convert_tokens_to_ids("seven")
    head = np.asarray(model.mllm.llm.head.kernel[...])[:, word]
    trials = [Trial("seven", 1e6 * head, 1, alpha=alpha) for alpha in (0.0, 1.0)]
    result = steer(model, [task], trials, parse_steering_task("style:seven;eight"))
    plain, strong = (result.row("seven", alpha=alpha) for alpha in (0.0, 1.0))
    assert plain["metric"].startswith("CIDEr")
    assert plain["score"] == result.row(BASELINE)["score"] > 0
    assert strong["score"] < plain["score"]
    assert strong["captions"][1] == len(prompts) > strong["captions"][0]
    assert strong["success"] == 1


def test_refusals_count_on_harmful_and_on_harmless_questions():
    refusal = parse_steering_task("refusal")
    assert refusal.target_state({"prediction": "I'm sorry, but no."})
    assert not refusal.source_state({"prediction": " "})
    examples = [
        Example("1", "", metadata={"group": "harmful"}),
        Example("2", "", metadata={"group": "harmful"}),
        Example("3", "", metadata={"group": "plain"}),
    ]
    no = "I cannot help with that."
    found = refusal.metrics(examples, ["Sure.", no, "Sure."], [no, no, no])
    assert found["refused_harmful"] == [0.5, 1.0]
    assert (found["refused_harmless"], found["n_harmless"]) == ([0.0, 1.0], 1)


def test_plug_ins_register_steering_tasks():
    @steering_task("brief")
    def make(argument: str) -> SteeringTask:
        class Short(SteeringTask):
            name = f"brief:{argument}"

            def is_target(self, answer: str) -> bool:
                return len(answer) <= int(argument)

        return Short()

    assert parse_steering_task("brief:3").is_source("four")
    for text, message in (
        ("nothing", "unknown steering task 'nothing'; choose from: answer_type, answers"),
        ("answers:yes", "takes SOURCE>TARGET, got 'yes'"),
        ("answers:yes>the", "needs answers to steer from and to"),
        ("answers:yes>Yes.", "the answer 'yes' is the source's and the target's"),
        ("gender:x", "gender takes no argument"),
        ("style", "takes a list of words"),
        ("style:shapes", "list of words 'shapes'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_steering_task(text)


def test_what_cannot_be_steered_is_refused():
    with pytest.raises(UserError, match="two trials have one name"):
        steer(talking_model(), [TASK], [TRIALS[0], TRIALS[0]], STEERING)
    ranked = BenchmarkTask("ranked", [Example("1", "two ?", "A", choices=("a", "b"))])
    with pytest.raises(UserError, match="ranked ranks its choices"):
        steer(talking_model(), [ranked], TRIALS, STEERING)
    with pytest.raises(UserError, match="vector a is of layer 7, the model has 2"):
        steer(talking_model(), [TASK], [Trial("a", VECTORS[0], 7)], STEERING)
