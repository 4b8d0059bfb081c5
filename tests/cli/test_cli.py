"""The command line from end to end: the demo in a process of its own, then what it left behind."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import clean_environment
from PIL import Image

from moresjax import load
from moresjax.cli import main
from moresjax.configs import digits as recipe
from moresjax.data.digits import FAMILIES
from moresjax.inference.chat import Chat
from moresjax.studies.pipeline import FAST

CONFIG = recipe.__file__
CLOSED = Path(__file__).parents[1] / "closed"


@pytest.fixture(scope="module")
def demo(tmp_path_factory, run_moresjax):
    """A demo of a few steps per stage without a network: all the plumbing, none of the learning."""
    out = tmp_path_factory.mktemp("demo") / "out"
    log = out.with_name("network.log")
    closed = [str(CLOSED), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = clean_environment() | {"NETWORK_LOG": str(log), "PYTHONPATH": os.pathsep.join(closed)}
    env.pop("HF_HUB_OFFLINE", None)  # what the command says itself has to do
    done = run_moresjax("demo", "--fast", "--out", out, "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert not log.exists(), log.read_text()
    return out, json.loads(done.stdout)


def test_the_demo_writes_one_self_contained_report(demo):
    out, _ = demo
    page = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    for name in recipe.METHODS:
        assert name in page
    figures = {path.name for path in out.glob("*.png")}
    assert {"accuracy.png", "attention_share.png", "lmar.png", "heat_map.png"} <= figures
    for path in out.glob("*.png"):
        assert min(Image.open(path).size) > 100


def test_the_demo_has_a_page_about_states(demo):
    out, printed = demo
    page, found = (out / "states.html").read_text(), printed["states"]
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(sources) == 1 + bool(found["steering"])
    assert sum(row["n"] for row in found["concepts"]) == found["states"] == 5 * len(FAMILIES)
    assert all(row["of"] <= row["n"] for row in found["concepts"])


def test_the_demos_numbers_are_those_of_its_runs(demo):
    out, printed = demo
    results = json.loads((out / "results.json").read_text())
    assert results == printed
    assert results["split"] == "test"
    assert list(results["methods"]) == ["zero-shot", *recipe.METHODS]
    assert set(results["majority"]) == set(FAMILIES)
    layers, width = FAST["model.llm.num_layers"], FAST["model.llm.hidden_size"]
    for name, method in results["methods"].items():
        assert set(method["accuracy"]) == set(FAMILIES)
        assert method["mean"] == pytest.approx(np.mean(list(method["accuracy"].values())))
        share = np.asarray(method["attention"]["share"])
        assert share.shape == (layers, 4)
        np.testing.assert_allclose(share.sum(1), 1, atol=1e-4)
        assert len(method["attention"]["lmar"]["text"]) == layers
        if name != "zero-shot":
            folder = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
            saved = out / "seed0" / "finetune" / folder / "eval-test" / "results.json"
            assert json.loads(saved.read_text())["mean_accuracy"] == pytest.approx(method["mean"])
            adapter = json.loads((out / "adapters" / folder / "tuning.json").read_text())
            assert adapter["parameters"] == method["trainable"]
    rank = 4
    assert results["methods"]["mores r=4"]["trainable_in_llm"] == layers * (2 * width * rank + rank)
    assert results["methods"]["connector only"]["trainable_in_llm"] == 0


def test_evaluate_and_analyze_run_on_what_the_demo_trained(demo, tmp_path, capsys):
    out, _ = demo
    model = str(out / "seed0" / "finetune" / "mores-r-1")
    common = ["--limit", "3", "--batch-size", "21", "--json"]
    evaluate = ["evaluate", "--model", model, "--tasks", "digits", "--out", str(tmp_path / "e")]
    assert main([*evaluate, *common]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [s["n"] for s in scores.values()] == [3] * len(FAMILIES)
    assert len((tmp_path / "e" / "predictions.jsonl").read_text().splitlines()) == 3 * len(FAMILIES)
    arguments = ["analyze", "attention", "--model", f"mores={model}", "--out", str(tmp_path / "a")]
    arguments += ["--tasks", "digits"]
    assert main([*arguments, *common, "--mesh", "replicated"]) == 0
    summary = json.loads(capsys.readouterr().out)["mores"]
    assert summary["samples"] == 3 * len(FAMILIES)
    assert (tmp_path / "a" / "attention_share.png").is_file()


def test_a_model_in_a_folder_judges(demo, tmp_path, capsys):
    out, _ = demo
    folder = tmp_path / "root" / "mm_vet"
    folder.mkdir(parents=True)
    question = {"imagename": "0.jpg", "question": "how many ?", "answer": "two"}
    (folder / "mm-vet.json").write_text(json.dumps({"v1_0": question | {"capability": ["rec"]}}))
    said = json.dumps({"question_id": "v1_0", "text": "two"})
    (tmp_path / "said.jsonl").write_text(said)
    command = ["evaluate", "--tasks", "mm_vet", "--predictions", tmp_path / "said.jsonl", "--json"]
    command += ["--data-root", tmp_path / "root", "--limit", "1", "--out", tmp_path / "e"]
    model = out / "seed0" / "finetune" / "lora-r-8"
    assert main([*map(str, command), "--judge-model", str(model)]) == 0
    score = json.loads(capsys.readouterr().out)["scores"]["mm_vet"]
    assert score["judge"]["name"] == model.name
    (first, *_) = (tmp_path / "e" / "judge.jsonl").read_text().splitlines()
    assert json.loads(first)["judge"] == model.name
    assert "does not exist" in refused([*command, "--judge-model", tmp_path / "none"], capsys)
    assert "--judge-model" in refused([*command, "--judge-url", "http://localhost"], capsys)


def test_generate_answers_about_an_image_file(demo, tmp_path, capsys):
    out, _ = demo
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "scene.png")
    arguments = ["generate", "--model", str(out / "seed0" / "finetune" / "lora-r-8")]
    arguments += ["--image", str(tmp_path / "scene.png"), "--prompt", "what is the largest ?"]
    assert main([*arguments, "--max-new-tokens", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["images"] == [str(tmp_path / "scene.png")]
    assert isinstance(answer["text"], str)


def test_template_and_image_aspect_can_be_said(demo, tmp_path, capsys):
    out, _ = demo
    folder, wide = str(out / "seed0" / "finetune" / "ia3"), np.zeros((16, 48, 3), np.uint8)
    wide[:, :24] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    model = load(folder, image_aspect="pad", template="vicuna_v1")
    row, plain = (m.prompt("two ?", [wide]) for m in (model, load(folder)))
    assert len(row) > len(plain)
    assert np.ptp(row.pixels[:, 0]) == 0 < np.ptp(plain.pixels[:, 0])
    options = ["--image-aspect", "pad", "--template", "vicuna_v1", "--max-new-tokens", "3"]
    command = ["generate", "--model", folder, "--image", str(tmp_path / "wide.png"), *options]
    assert main([*command, "--prompt", "two ?", "--json"]) == 0
    (expected,) = model.generate(["two ?"], [[wide]], max_new_tokens=3)
    assert json.loads(capsys.readouterr().out)["text"] == expected
    bad = [*command, "--prompt", "two ?", "--image-aspect", "fill"]
    assert "image aspect 'fill'" in refused(bad, capsys)


def test_a_chat_goes_on_after_a_question_that_cannot_be_asked(demo, monkeypatch, capsys):
    out, _ = demo
    model = str(out / "seed0" / "finetune" / "ia3")
    asked = ["is there a two ?", "is " * 3000, "what is the largest ?"]
    chat = Chat(load(model), max_new_tokens=3)
    first, last = ("".join(chat.ask(asked[i])) for i in (0, 2))
    lines = iter([*asked, "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    capsys.readouterr()
    assert main(["generate", "--model", model, "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [first, last]
    assert "do not fit the model's" in printed.err
    assert f"{model}\n  llm: " in printed.err


def test_a_file_of_prompts_is_answered(demo, tmp_path, capsys):
    out, _ = demo
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    lines = [{"prompt": "is there a two ?"}, {"prompt": "what is the largest ?"}, {"prompt": " "}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = [
        "generate",
        "--model",
        str(out / "seed0" / "finetune" / "ia3"),
        "--prompts",
        str(prompts),
    ]
    command = [*base, "--out", str(answers), "--max-new-tokens", "4", "--batch-size", "2"]
    assert main([*command, "--json"]) == 2  # every answer is there, and one is missing
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"records": 3, "errors": 1}
    told = f"1 of 3 prompts have no answer; {answers} has the reason of each"
    assert printed.err.endswith(f"moresjax: error: {told}\n")
    whole = [json.loads(line) for line in answers.read_text().splitlines()]
    assert whole[2]["error"] == "the prompt is empty"
    said = whole[0]["text"].split()
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert main([*command, "--stop", said[0]]) == 0
    cut = [json.loads(line) for line in answers.read_text().splitlines()]
    assert cut[0]["text"] == ""
    drawn = ["--temperature", "5", "--top-p", "0.9", "--seed", "3"]
    assert main([*command, *drawn]) == 0
    again = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["text"] for line in again[:2]] != [line["text"] for line in whole[:2]]
    for changes, message in (
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--batch-size", "-2"], "batch_size must be at least 1, got -2"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--out", str(prompts)], "is the file of prompts; the answers need another one"),
        (["--out", str(tmp_path)], "cannot be written: Is a directory"),
    ):
        assert message in refused([*command, *changes], capsys)
    assert "no place for a system prompt" in refused([*command, "--system", "two ."], capsys)
    assert len(prompts.read_text().splitlines()) == 2
    assert len(answers.read_text().splitlines()) == 2


def test_an_adapter_is_put_on_its_base(demo, capsys):
    out, _ = demo
    (folder,) = out.glob("adapters/lora*")
    base = ["--model", str(out / "seed0" / "pretrain"), "--template", recipe.TEMPLATE]
    answers = []
    for model in (
        [*base, "--adapter", str(folder)],
        ["--model", str(out / "seed0" / "finetune" / folder.name)],
        base,
    ):
        command = ["generate", *model, "--prompt", "what is the largest ?", "--json", "--logprobs"]
        capsys.readouterr()
        assert main([*command, "--max-new-tokens", "6"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    put_on, trained, before = answers
    assert put_on["tokens"] == trained["tokens"]
    np.testing.assert_allclose(put_on["logprobs"], trained["logprobs"], atol=1e-5)
    assert abs(put_on["logprobs"][0] - before["logprobs"][0]) > 1e-3
    bad = ["generate", "--model", out / "seed0" / "pretrain", "--adapter", out, "--prompt", "two ?"]
    assert "is not an adapter folder" in refused(bad, capsys)


def test_json_carries_tokens_stop_reason_and_log_probabilities(demo, capsys):
    out, _ = demo
    folder = str(out / "seed0" / "finetune" / "ia3")
    command = ["generate", "--model", folder, "--prompt", "is there a two ?", "--json"]
    assert main([*command, "--max-new-tokens", "3", "--logprobs"]) == 0
    printed = json.loads(capsys.readouterr().out)
    options = {"max_new_tokens": 3, "details": True, "logprobs": True}
    answer = load(folder).generate("is there a two ?", **options)
    assert printed.pop("images") == []
    assert printed.pop("prompt") == "is there a two ?"
    assert printed == answer.to_dict()
    assert len(printed["logprobs"]) == len(printed["tokens"]) > 0
    assert printed["stop_reason"] in ("eos", "length")
    assert main([*command, "--max-new-tokens", "3"]) == 0
    del printed["logprobs"]
    assert json.loads(capsys.readouterr().out).items() >= printed.items()
    assert "--logprobs goes with" in refused([*command[:-1], "--logprobs"], capsys)


def test_one_file_of_prompts_mixes_adapters_and_the_base(demo, tmp_path, capsys):
    out, _ = demo
    # Two kinds, each with the connector that trained with it.
    (lora,), (other,) = out.glob("adapters/lora*"), out.glob("adapters/ia3*")
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    names = ["one", "base", "two", None, "one", "three"]
    records = [{"prompt": "what is the largest ?", "by": name} for name in names]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = ["generate", "--model", out / "seed0" / "pretrain"]
    command = [*model, "--prompts", prompts, "--out", answers, "--adapter-for", "by", "--logprobs"]
    command += ["--batch-size", "20"]  # of which the five are read at once, to the same bit
    both = ["--adapter", f"one={lora}", "--adapter", f"two={other}", "--max-new-tokens", "4"]
    assert main([str(x) for x in (*command, *both)]) == 2
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line.get("adapter") for line in lines[:5]] == names[:5]
    assert "unknown adapter of record 5 'three'; choose from: one, two, base" in lines[5]["error"]
    capsys.readouterr()
    for number, adapter in ((0, lora), (2, f"two={other}")):
        alone = [*model, "--adapter", adapter, "--prompt", records[0]["prompt"]]
        alone += ["--max-new-tokens", "4", "--json", "--logprobs"]
        assert main([*map(str, alone)]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert lines[number]["tokens"] == answer["tokens"]
        np.testing.assert_allclose(lines[number]["logprobs"], answer["logprobs"], atol=1e-4)
    assert lines[3]["logprobs"] == lines[1]["logprobs"] != lines[2]["logprobs"]
    assert lines[4]["logprobs"] == lines[0]["logprobs"] != lines[1]["logprobs"]
    two = ["--adapter", lora, "--adapter", other]
    assert "several --adapter need names" in refused([*command, *two], capsys)
    alone = [*model, *both, "--prompt", "two ?"]
    assert "a single --prompt takes one --adapter" in refused(alone, capsys)


def test_params_of_a_run(demo, capsys):
    out, printed = demo
    assert main(["params", "--model", str(out / "seed0" / "finetune" / "ia3"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trainable"] == printed["methods"]["ia3"]["trainable"]


def refused(arguments, capsys) -> str:
    """The one sentence that a wrong command line is answered with."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("moresjax: error: ")
    return lines[0]


TRAIN = ["train", "--config", f"{CONFIG}:stage=llm", "--workdir"]


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        (f"{CONFIG}:stage=llm", ["--config.step=3"], ["'step'", "steps"]),
        (f"{CONFIG}:stage=llm", ["--config.optimizer.rate=3"], ["'optimizer.rate'", "lr"]),
        (f"{CONFIG}:stage=llm", ["--config.steps=many"], ["steps", "int", "'many'"]),
        (f"{CONFIG}:stage=llm", ["--config.data.tasks=text"], ["'tasks'", "task"]),
        (f"{CONFIG}:stage=llm", ["--config.model.llm.layers=2"], ["'layers'", "num_layers"]),
        (f"{CONFIG}:stage=sft", [], ["'sft'", "finetune"]),
        (f"{CONFIG}:stages=llm", [], ["'stages=llm'", "stage"]),
        ("nowhere.py", [], ["nowhere.py", "does not exist"]),
        (f"{CONFIG}:stage=llm", ["--config.tuning=moress"], ["'moress'", "mores"]),
        (f"{CONFIG}:stage=llm", ["--config.tuning=mores:positions=img"], ["'img'", "image"]),
        (f"{CONFIG}:stage=llm", ["--config.tuning=mores:layers=9"], ["layer 9", "0-2"]),
        (f"{CONFIG}:stage=llm", ["--config.tuning=mores:rank=0"], ["rank", "at least 1"]),
        (f"{CONFIG}:stage=llm", ["--config.tuning=mores:rank=97"], ["rank=97", "96"]),
        (f"{CONFIG}:stage=llm", ["--config.also_train=head"], ["'head'", "llm"]),
        (f"{CONFIG}:stage=finetune", [], ["init", "llm", "neither a workdir nor"]),
        (f"{CONFIG}:stage=llm", ["--config.template=chat"], ["'chat'", "vicuna_v1"]),
        (f"{CONFIG}:stage=llm", ["--config.batch_size=0"], ["batch_size", "at least 1"]),
        (f"{CONFIG}:stage=llm", ["--config.max_seq_len=20"], ["tokens do not fit into 20"]),
    ],
)
def test_a_wrong_training_command_is_one_sentence(config, overrides, words, tmp_path, capsys):
    command = ["train", "--config", config, "--workdir", tmp_path / "run", *overrides]
    sentence = refused(command, capsys)
    for word in words:
        assert word in sentence
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_models_and_tasks_that_do_not_exist(demo, tmp_path, capsys):
    out, _ = demo
    model, empty = out / "seed0" / "finetune" / "ia3", tmp_path / "empty"
    empty.mkdir()
    evaluate = ["evaluate", "--tasks", "digits", "--out", tmp_path / "e", "--model"]
    assert "--tasks" in refused(["evaluate", "--model", model, "--out", tmp_path / "e"], capsys)
    assert "does not exist" in refused([*evaluate, tmp_path / "nothing"], capsys)
    assert "config.json" in refused([*evaluate, empty], capsys)
    assert "'digit'" in refused([*evaluate, model, "--tasks", "digit"], capsys)
    assert "patch_classes" in refused([*evaluate, out / "seed0" / "vit"], capsys)
    assert not (tmp_path / "e").exists()
    assert "'phi-3'" in refused(["params", "--llm", "phi-3"], capsys)
    assert "--nonsense" in refused(["params", "--nonsense"], capsys)


def test_prompts_and_images_that_do_not_agree(demo, tmp_path, capsys):
    out, _ = demo
    generate = ["generate", "--model", out / "seed0" / "finetune" / "ia3", "--prompt"]
    (tmp_path / "broken.png").write_bytes(b"not an image")
    image = ["--image", tmp_path / "broken.png"]
    assert "broken.png cannot be read" in refused([*generate, "is there a two ?", *image], capsys)
    image = ["--image", tmp_path / "missing.png"]
    assert "missing.png does not exist" in refused([*generate, "is there a two ?", *image], capsys)
    sentence = refused([*generate, "<image>\nis there a two ?"], capsys)
    assert "1 <image> but 0 images" in sentence
    assert "prompt is empty" in refused([*generate, " "], capsys)


def test_a_damaged_run_is_refused_and_left_as_it_is(demo, tmp_path, capsys):
    out, _ = demo
    run = tmp_path / "llm"
    shutil.copytree(out / "seed0" / "llm", run)
    (run / "train.json").unlink()
    arrays = [
        p for p in (run / "checkpoints").rglob("*") if p.is_file() and p.stat().st_size > 4096
    ]
    for path in arrays:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    command = ["train", "--config", f"{CONFIG}:stage=llm", "--workdir", run]
    command += ["--config.steps=4", "--config.batch_size=8", "--config.name=llm"]
    sentence = refused(command, capsys)
    assert "damaged" in sentence
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    evaluate = ["evaluate", "--model", run, "--tasks", "digits"]
    assert "damaged" in refused([*evaluate, "--out", tmp_path / "e"], capsys)


def test_a_directory_of_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no run" in refused([*TRAIN, tmp_path], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert "at least 1" in refused(["demo", "--out", tmp_path, "--seeds", "0"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_beam_search_is_for_one_prompt(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path), "--num-beams", "3"]) == 2
    assert "--num-beams goes with a single --prompt" in capsys.readouterr().err


def test_a_plan_is_for_one_batch_size_unless_it_is_a_search(capsys):
    arguments = ["plan", "--config", f"{CONFIG}:stage=finetune", "--topology", "v5e-8"]
    assert main([*arguments, "--batch", "8", "16"]) == 2
    assert "several --batch go with --search" in capsys.readouterr().err


def test_a_plan_is_of_a_train_step_or_of_generation(capsys):
    arguments = ["plan", "--config", f"{CONFIG}:stage=finetune", "--topology", "v5e-8"]
    assert main([*arguments, "--prompt", "64"]) == 2
    assert "--prompt goes with --generate" in capsys.readouterr().err
    assert main([*arguments, "--search", "--generate", "8"]) == 2
    assert "--search is for train steps, not for --generate" in capsys.readouterr().err


def test_the_demo_names_the_command_that_serves_its_models(demo, monkeypatch, capsys):
    out, printed = demo
    monkeypatch.setattr("moresjax.studies.demo.run_demo", lambda *_, **__: printed)
    assert main(["demo", "--out", str(out)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"talk to its models: moresjax serve {out}"

    seen = {}
    monkeypatch.setattr("moresjax.serve.run.serve", lambda server, *_, **__: seen.update(it=server))
    assert main(last.split()[5:]) == 0
    server = seen["it"]
    server.close()
    base, *adapters = server.models()
    assert (base["id"], base["root"]) == (out.name, str(out / "seed0" / "pretrain"))
    names = {path.name for path in (out / "adapters").iterdir()}
    assert {each["id"] for each in adapters} == names - {"full"}
    assert all(each["root"] == str(out / "adapters" / each["id"]) for each in adapters)
    assert "full changes the LLM that all rows share" in capsys.readouterr().err
