"""The borders of the system: for each, hostile input of its kind and what reads it."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from fuzz_documents import TEXT_CHANGE, damaged, documents, json_texts, line_texts, phrases
from hypothesis import strategies as st
from PIL import Image

from moresjax.cli.app import _parse
from moresjax.core.errors import UserError
from moresjax.core.patterns import full_match
from moresjax.data.arrayrecord import INDEX, ArrayRecordSource
from moresjax.data.images import open_image
from moresjax.data.labels import _grid
from moresjax.data.llava import LlavaSource, image_names, independent_turns, to_sample
from moresjax.data.region_providers import region_provider
from moresjax.data.skipping import SkipPolicy
from moresjax.evaluation.attention_log import AttentionLog
from moresjax.evaluation.compare import read_scores
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import result_reader
from moresjax.evaluation.judges import CachedJudge
from moresjax.evaluation.predictions import PredictionLog, read_predictions
from moresjax.evaluation.questions import load_questions
from moresjax.evaluation.results import EvaluationResult, _earlier
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.models.connector import linear_widths, neighbours, parse_connector
from moresjax.reports.runs import gather
from moresjax.runs.config import load_config, parse_arg, read_config
from moresjax.testing.models import tiny_config
from moresjax.training.metrics import _logged
from moresjax.training.prepare import TrainResult
from moresjax.tuning.selectors import parse_layers, parse_selector
from moresjax.tuning.spec import parse_spec
from moresjax.weights.adapter_files import Description, PeftConfig, PyreftConfig, load_tensors
from moresjax.weights.files import stored_in
from moresjax.weights.hf import HFFolder


@dataclasses.dataclass(frozen=True)
class Border:
    """A border.

    Attributes:
      cases: What comes to it.
      read: Reads a case, with a folder to write it to; it returns, or raises a `UserError`.
      share: How many of a thousand cases are its own.
    """

    cases: st.SearchStrategy[Any]
    read: Callable[[Any, Path], object]
    share: int = 50


def _written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    return path


# Data

CONVERSATION = [
    {"from": "human", "value": "<image>\nWho?"},
    {"from": "gpt", "value": "Ann"},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "Here"},
]
PARTS = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Who?"},
            {"type": "image_url", "image_url": {"url": "a.png"}},
        ],
    },
    {"role": "assistant", "content": "Ann"},
]
RECORDS = (
    {"id": "1", "image": "a.png", "conversations": CONVERSATION},
    {"id": 2, "messages": PARTS},
    {
        "images": ["a.png"],
        "conversations": CONVERSATION[:2],
        "roi": [[[0.1, 0.2, 0.5, 0.6]]],
        "marks": {"who": ["Who"], "it": [[0, 1, 3]]},
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    [],
)


def read_record(record: Any, folder: Path) -> None:
    names = image_names(record, "1")
    for prompt in (False, True):
        try:
            independent_turns(to_sample(record, "1", names, prompt=prompt))
        except UserError:
            if prompt:
                raise


def read_data_file(text: str, folder: Path) -> None:
    source = LlavaSource(str(_written(folder, "data.json", text)), str(folder))
    for index in range(len(source)):
        with contextlib.suppress(UserError):  # which costs its own sample
            _ = source[index]


def read_questions(text: str, folder: Path) -> None:
    load_questions(_written(folder, "questions.jsonl", text))


def read_index(text: str, folder: Path) -> None:
    _written(folder, INDEX, text)
    (folder / "data-0").mkdir(exist_ok=True)
    _ = ArrayRecordSource(str(folder)).sizes


def read_image(content: bytes, folder: Path) -> None:
    open_image(content)


def _picture(kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (3, 2)).save(file, kind)
    return file.getvalue()


PICTURES = [
    _picture(*each) for each in (("PNG", "RGB"), ("JPEG", "L"), ("TIFF", "F"), ("GIF", "P"))
]
PICTURES += [_picture("TIFF", "I;16"), _picture("BMP", "RGB"), _picture("WEBP", "RGBA")]


def _bytes_changed(content: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    found = bytearray(content)
    for place, value in changes:
        found[place % len(found)] = value
    return bytes(found[: len(found) - cut % len(found)] if cut % 3 == 0 else found)


def damaged_bytes(*contents: bytes) -> st.SearchStrategy[bytes]:
    change = st.tuples(st.integers(0, 1 << 20), st.integers(0, 255))
    return st.builds(
        _bytes_changed,
        st.sampled_from(contents),
        st.lists(change, max_size=4),
        st.integers(0, 1 << 20),
    )


# Strings of commands and configs

METHODS = ("mores", "lora", "vera", "boft", "oft", "reft", "steer", "prefix", "mrt", "full", "none")
KEYS = ("rank", "layers", "positions", "targets", "factors", "length", "dropout", "alpha", "seed")
SPECS = phrases(
    *METHODS,
    *KEYS,
    ":",
    ":",
    ",",
    ",",
    "=",
    "=",
    "/",
    ";",
    "-",
    "all",
    "shallow",
    "image:f4+l5",
    "q",
)
GROWN = st.builds(
    lambda method, pairs: f"{method}:" + ",".join(f"{key}={value}" for key, value in pairs),
    st.sampled_from(METHODS),
    st.lists(
        st.tuples(
            st.sampled_from(KEYS),
            phrases("all", "0-", ";", "image", ":", "f4", "q", "every:", "-", "true", most=3),
        ),
        max_size=3,
    ),
)


def read_spec(spec: str, folder: Path) -> None:
    config = tiny_config()
    for method in parse_spec(spec):
        if method.name not in ("control",):
            method.resolve(config).sites(config)
        parse_layers(method.layer_choice, config.llm.num_layers)


def read_selector(text: str, folder: Path) -> None:
    for _, part in parse_selector(text).parts:
        assert 0 <= part.needs < 2**31


SELECTORS = phrases(
    *(
        "image",
        "question",
        "all",
        "system",
        "last_prompt",
        "roi",
        "mark(a)",
        "word(",
        "token(",
        ")",
    ),
    *(":", "|", "f", "l", "+", "uniform(", "%", "at(", ";", "skip("),
)


def read_layers(case: tuple[str, int], folder: Path) -> None:
    assert any(parse_layers(*case))


def read_connector(text: str, folder: Path) -> None:
    _, options = parse_connector(text)
    if options is None:
        assert neighbours(text) < 10_000
        assert len(linear_widths(text, 8, 8) or ()) <= 100


def read_override(case: tuple[str, str], folder: Path) -> None:
    load_config("digits", ["=".join(case)])


CONFIG_KEYS = ("steps", "seed", "tuning", "also_train", "model.llm", "model.vision.num_layers")
CONFIG_KEYS += (
    "optimizer.lr",
    "mesh.fsdp",
    "data.files",
    "buckets",
    "init.llm",
    "",
    "a.b.c",
    "name",
)


def read_argument(text: str, folder: Path) -> None:
    parse_arg(text, tuning="none", steps=10, lr=1e-3, resume=True, name="")


def read_region(text: str, folder: Path) -> None:
    region_provider(text)


def read_pattern(pattern: str, folder: Path) -> None:
    for name in ("llm.blocks.attn.q.kernel", "a" * 60, "connector.layers.0.bias" * 3):
        full_match(pattern, name)


def read_words(words: list[str], folder: Path) -> None:
    _parse(words)


WORDS = (
    *(
        "train",
        "evaluate",
        "generate",
        "data",
        "plan",
        "analyze",
        "serve",
        "compare",
        "zoo",
        "params",
    ),
    *("--config", "--workdir", "--model", "--tasks", "--limit", "--batch-size", "--seed", "--mesh"),
    *(
        "digits",
        "pope",
        "-1",
        "0",
        "1e99",
        "x",
        "--config.seed=-1",
        "--",
        "--json",
        "convert",
        "check",
    ),
)


# What runs and evaluations write

CONFIG = json.loads(json.dumps(load_config("digits:stage=finetune,tuning=mores").to_dict()))
TASK = BenchmarkTask("t", [Example("1", "a?", "yes"), Example("2", "b?", "no")])
MADE = {"model": "m", "processor": "p", "weights": "w"}
ROWS = tuple(
    {"task": "t", "id": e.id, "prompt": e.prompt, "prediction": "yes", "score": 1.0, **MADE}
    for e in TASK.examples
)
ATTENTION = {
    **{"task": "t", "id": "1", "prompt": "a?", "tokens": [1], "has_image": True},
    **{"visual_share": 0.5, "score": [1.0], "mass_shape": [1], "mass": "AACAPw==", **MADE},
}
JUDGED = {"judge": "j", "settings": {}, "prompt_hash": "0", "attempt": 0, "reply": "Yes"}
ENTRY = {
    **{"benchmark": "t", "split": None, "score": 1.0, "fraction": True, "n": 2, "prompt_hash": "0"},
    **{"metric": "accuracy", "stderr": None, "points": False, "missing": 0, "details": {}},
}
RESULTS = {
    **{"model": "runs/x", "fingerprint": "m", "processor": {"hash": "p"}, "decoding": "greedy"},
    **{"mean_accuracy": 1.0, "scores": {"t": ENTRY}, "split": None},
}


def read_run_config(text: str, folder: Path) -> None:
    read_config(_written(folder, "config.json", text))


def read_result(text: str, folder: Path) -> None:
    from moresjax.core.reading import read_json

    read_json(_written(folder, "train.json", text), TrainResult)


def read_metrics(text: str, folder: Path) -> None:
    _logged(_written(folder, "metrics.jsonl", text), 3)


def read_skipped(text: str, folder: Path) -> None:
    SkipPolicy("skip", 9, {1: "bad"}).save(_written(folder, "skipped.json", text))


def read_prediction_file(text: str, folder: Path) -> None:
    found, _ = read_predictions(TASK, _written(folder, "predictions.jsonl", text))
    assert all(isinstance(answer, str) for answer in found.values())


def continue_predictions(text: str, folder: Path) -> None:
    _written(folder, "predictions.jsonl", text)
    PredictionLog(folder, MADE).known(TASK)


def read_official(text: str, folder: Path) -> None:
    path = _written(folder, "answers.json", text)
    for fields in (("question_id", "answer"), (None, "answer")):
        result_reader(*fields)(path)


def continue_attention(text: str, folder: Path) -> None:
    _written(folder, "attention.jsonl", text)
    AttentionLog(folder, MADE).known(TASK)


def continue_judge(text: str, folder: Path) -> None:
    class Contrary:
        name, settings = "j", {}

        def __call__(self, prompt: str, attempt: int) -> str:
            return "No"

    _written(folder, "judge.jsonl", text)
    assert isinstance(CachedJudge(Contrary(), folder)("Is it?", 0), str)


def read_scored(text: str, folder: Path) -> None:
    _written(folder, "predictions.jsonl", text)
    read_scores(folder)


def continue_results(text: str, folder: Path) -> None:
    _earlier(EvaluationResult({}, [], model="m"), _written(folder, "results.json", text))


def report_results(case: tuple[str, str], folder: Path) -> None:
    _written(folder, "results.json", case[0])
    _written(folder, "predictions.jsonl", case[1])
    gather([str(folder)])


# Weights

TENSORS = safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float16)})
DESCRIPTION = {
    **{
        "format": "moresjax-tuning",
        "version": "0.2.0",
        "spec": "mores:rank=2",
        "also_train": ["ln"],
    },
    "base": {"config": {"llm": {"num_layers": 3}}, "checksums": {"llm.norm.scale": 7}},
}
PEFT = {
    **{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"},
    **{"rank_pattern": {"q": 4}, "alpha_pattern": {}, "modules_to_save": None, "use_dora": False},
    **{"layers_to_transform": [0, 1], "layers_pattern": "layers", "init_lora_weights": True},
}
PYREFT = {
    "representations": [[0, "block_output", "pos", 1, 4, None], {"layer": 1, "component": "x"}],
    "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"],
    "intervention_constant_sources": [True],
}
LLAMA = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32},
    **{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4},
    **{"max_position_embeddings": 64, "tie_word_embeddings": False, "torch_dtype": "float32"},
}
LLAVA = {
    **{"model_type": "llava", "text_config": LLAMA, "projector_hidden_act": "gelu"},
    "vision_config": {
        **{"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    },
    **{"image_token_index": 31, "vision_feature_layer": -2, "image_seq_length": 4},
}


def read_tensors(content: bytes, folder: Path) -> None:
    path = _written(folder, "model.safetensors", content)
    load_tensors(path)
    stored_in(path)


def read_hf(text: str, folder: Path) -> None:
    _written(folder, "config.json", text)
    config = HFFolder(folder).config
    assert 0 < config.llm.num_layers <= 10_000


def typed(kind: Any, name: str) -> Callable[[str, Path], object]:
    from moresjax.core.reading import read_json

    return lambda text, folder: read_json(_written(folder, name, text), kind)


BORDERS = {
    "record": Border(documents(*RECORDS), read_record, 60),
    "data file": Border(st.one_of(json_texts([*RECORDS]), line_texts(*RECORDS)), read_data_file),
    "questions": Border(
        line_texts(
            {"id": "1", "question": "a?", "answer": "b", "choices": ["b", "c"], "image": "x"}
        ),
        read_questions,
    ),
    "ArrayRecord index": Border(
        json_texts({"records": 1, "shards": {"data-0": 1}}), read_index, 20
    ),
    "image": Border(damaged_bytes(*PICTURES), read_image),
    "label grid": Border(
        documents({"image": "a.png", "labels": [[0, 1], [1, None]]}), lambda x, _: _grid(x, "1")
    ),
    "spec": Border(st.one_of(SPECS, GROWN), read_spec, 80),
    "selector": Border(SELECTORS, read_selector, 80),
    "layers": Border(
        st.tuples(phrases("all", "0", ";", "-", "every:", "deep", "3"), st.integers(1, 40)),
        read_layers,
    ),
    "connector": Border(
        phrases(
            "mlp", "x_gelu", "concat", "-", "norm-", "linear", "resampler", ":", "layers=", ",", "2"
        ),
        read_connector,
    ),
    "config override": Border(
        st.tuples(st.sampled_from(CONFIG_KEYS), phrases("1", "-", "[", "mores", "(", "*", "1e9")),
        read_override,
        8,
    ),
    "config argument": Border(
        phrases(
            "tuning=", "steps=", "lr=", "mores", ":", ",", "rank=", "[", "]", "true", "resume="
        ),
        read_argument,
    ),
    "region": Border(
        phrases(
            "center(", "random", "attention(", "%)", ";", ",", "0.1", "1", "boxes", ".json", "all"
        ),
        read_region,
    ),
    "pattern": Border(
        phrases(
            *(
                "a",
                "[a-z.]",
                ".",
                "*",
                "+",
                "(",
                ")",
                "|",
                "?",
                "{1,9}",
                "\\d",
                "(?!",
                "(?:",
                "(?=",
                "$",
            ),
            *("^", "X", "\\1", "(?R)", "(?P<a>", ".*"),
            most=16,
        ),
        read_pattern,
    ),
    "command line": Border(st.lists(st.sampled_from(WORDS), max_size=6), read_words, 5),
    "config.json of a run": Border(json_texts(CONFIG), read_run_config, 30),
    "train.json": Border(
        json_texts({"step": 3, "metrics": {"loss": 1.5}, "seconds": 1.0, "compile_seconds": 2.0}),
        read_result,
    ),
    "metrics.jsonl": Border(line_texts({"step": 1, "loss": 2.0}, {"step": 2}), read_metrics),
    "skipped samples": Border(
        json_texts({"skipped": 1, "samples": {"3": "bad"}}), read_skipped, 10
    ),
    "predictions": Border(line_texts(*ROWS), read_prediction_file),
    "continued predictions": Border(line_texts(*ROWS), continue_predictions, 20),
    "official answers": Border(
        json_texts([{"question_id": 1, "answer": "a"}], {"1": "a"}, {"results": {"1": 2}}),
        read_official,
    ),
    "attention log": Border(line_texts(ATTENTION), continue_attention, 20),
    "judge log": Border(line_texts(JUDGED), continue_judge, 20),
    "scored predictions": Border(line_texts(*ROWS), read_scored),
    "results.json": Border(json_texts(RESULTS), continue_results),
    "reported results": Border(st.tuples(json_texts(RESULTS), line_texts(*ROWS)), report_results),
    "safetensors": Border(damaged_bytes(TENSORS), read_tensors),
    "tuning.json": Border(json_texts(DESCRIPTION), typed(Description, "tuning.json")),
    "adapter_config.json": Border(json_texts(PEFT), typed(PeftConfig, "adapter_config.json")),
    "config.json of pyreft": Border(json_texts(PYREFT), typed(PyreftConfig, "config.json")),
    "config.json of transformers": Border(json_texts(LLAMA, LLAVA), read_hf, 10),
}
__all__ = ["BORDERS", "TEXT_CHANGE", "Border", "damaged"]
