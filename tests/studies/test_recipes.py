"""The runs behind the papers' tables: their names are the papers', their counts those printed."""

import functools
import json
import re
from pathlib import Path

import pytest

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.presets import expand_presets
from moresjax.evaluation.steering.tasks import parse_steering_task
from moresjax.evaluation.tasks import benchmark_names
from moresjax.models.count import count_parameters
from moresjax.models.zoo import mllm_config
from moresjax.runs.architecture import model_config
from moresjax.runs.config import load_config
from moresjax.studies.recipes import CLASSES, NOT_REPRODUCED, RECIPES, select_recipes
from moresjax.tuning.methods.steer import Steer
from moresjax.tuning.spec import parse_spec

# LLaVA v1 with Vicuna-7B, of which the shares of MRT's Table 1 are.
LLAVA_V1 = 7_045_793_792
# MiniGPT-v2: EVA-ViT-g at 448 pixels, four tokens side by side, LLaMA-2 7B.
MINIGPT_V2 = 986_978_688 + 4 * 1_408 * 4_096 + 4_096 + 6_738_415_616
# What is counted where the papers print something else: a slip, a number without its decimal, and
# a pool whose routers are not known.
COUNTED = {"1.340M": 1_310_976, "83M": 83_886_080, "0.85%": 80_613_376}

STEERING_TASKS = ["SciQA-IMG", "VizWiz", "IconQA-txt", "IconQA-blank"]
# Names of rows as the papers print them.
ROWS = {
    ("llava-steering", "1"): [
        "FT",
        "Adapter",
        "LoRA",
        "OFT",
        "IA3",
        "MoReS-B",
        "MoReS-L",
        "MoReS-H",
    ],
    ("llava-steering", "2"): [
        f"LLaVA Steering-{size} {method}"
        for size in ("3B", "7B", "13B")
        for method in ("Adapter", "LoRA", "OFT", "IA3", "MoReS-B")
    ],
    ("llava-steering", "3"): [
        f"{scale} {method}"
        for scale in ("Small", "Medium", "Large")
        for method in ("FT", "Adapter", "LoRA", "OFT", "IA3", "MoReS-L")
    ],
    ("llava-steering", "4"): ["LoRA", "Adapter", "OFT", "IA3", "MoReS (Ours)"],
    ("llava-steering", "6"): ["Full", "LoRA", "Adapter", "OFT", "IA3", "MoReS"],
    ("llava-steering", "7"): ["1", "2", "4", "8"],
    ("llava-steering", "8"): ["1%", "25%", "50%", "100%"],
    ("llava-steering", "9"): ["[0,2,4,]", "[0,3,6,]", "[0,4,8,]", "All Layer"],
    ("llava-steering", "10"): [*("Shallow (0-15)", "Middle (8-23)", "Deep (16-31)", "All Layer")],
    ("shift", "1"): ["Yes/No", "Number", "Other"],
    ("shift", "2"): ["Yes (Yes/No)", "Number", "Other"],
    ("shift", "3"): ["colors", "places", "sentiments"],
    ("shift", "4"): ["Yes to No", "White to Black"],
    ("mrt", "1"): [
        *("LLaVAAlign", "LLaVAFT", "LoRA", "APrompt", "PTUM", "VPT", "ReFT", "M2PT", "MixLoRA"),
        "MRT",
    ],
    ("mrt", "2"): ["(a) cat", "(b) dog", "(c) ship", "(d) frog", "(e) truck"],
    ("mrt", "3"): [
        *("(a) First Layer", "(b) Odd Layers", "(c) First Half", "(d) Latter Half"),
        "(e) All Layers",
    ],
    ("mrt", "S3"): ["Prefix Only", "Suffix Only", "Prefix & Suffix", "All"],
    ("mrt", "S5"): [
        *("LLaVAFT", "LoRA", "MixLoRA", "M2PT", "MRT", "MiniGPT-v2", "MiniGPT-v2 LoRA"),
        *("MiniGPT-v2 ReFT", "MiniGPT-v2 MixLoRA", "MiniGPT-v2 M2PT", "MiniGPT-v2 MRT"),
    ],
    ("mrt", "S6"): ["LLM", "Cross-modality", "Vision encoder", "All (MRT)"],
    ("mrt", "S7"): ["M2PT", "MixLoRA", "VPT", "LoRA", "MRT"],
    ("mrt", "S8"): ["LLaVAFT", "VPT", "LoRA", "M2PT", "MixLoRA", "MRT"],
    ("mrt", "S9"): ["(a) cat", "(b) dog", "(c) ship", "(d) frog", "(e) truck"],
    ("mrt", "S10"): ["(a) name", "(b) color", "(c) brand"],
    ("mrt", "S11"): [
        "Is there an e object visible in the image?",
        "Does the image contain an object that is an e?",
        "Is the object shown in the image an e?",
        "Is the object in the picture an e?",
        "Do you recognize the object in the image as an e?",
        "Can you tell if the object shown in the image is specifically an e?",
    ],
}


@functools.cache
def counted(arguments):
    config = load_config(arguments)
    report = count_parameters(model_config(config), config.tuning, config.also_train)
    added = report.components["tuning"].total if "tuning" in report.components else 0
    return config, report, report.total - added


def resolved(recipe):
    """Configuration and counts; a task's data changes neither."""
    arguments = re.sub(r"stage=task,task=\w+,samples=\d+", "stage=finetune", recipe.config)
    return counted(arguments)


def agrees(printed, value):
    number, unit = re.fullmatch(r"([\d.]+)([MB%])", printed).groups()
    digits = len(number.partition(".")[2])
    return f"{value / {'M': 1e6, 'B': 1e9, '%': 0.01}[unit]:.{digits}f}" == number


@pytest.mark.parametrize(("paper", "table"), ROWS, ids=" ".join)
def test_the_rows_are_the_papers(paper, table):
    recipes = select_recipes(paper, table)
    assert list(dict.fromkeys(recipe.row for recipe in recipes)) == ROWS[paper, table]
    cells = [(recipe.row, recipe.column) for recipe in recipes]
    assert len(set(cells)) == len(cells)


def test_no_reading_of_mixlora_has_the_share_that_is_printed():
    """All linears, 16 factors each way: the pool, one router or two, with the connector or not."""
    inputs, outputs = 32 * (6 * 4096 + 11_008), 32 * (5 * 4096 + 2 * 11_008)
    pool = 16 * (inputs + outputs)
    sizes = [pool + n * 16 * inputs + c for n in (0, 1, 2) for c in (0, 4_198_400)]
    assert COUNTED["0.85%"] == sizes[-1]
    assert [f"{100 * size / LLAVA_V1:.2f}" for size in sizes] == [
        *("0.57", "0.63", "0.83", "0.89", "1.08", "1.14")
    ]
    # Nor of the LLM alone, with or without what is added.
    shares = [100 * size / (6_738_415_616 + added) for size in sizes for added in (0, size)]
    assert "0.85" not in [f"{share:.2f}" for share in shares]


def test_every_task_is_a_run_of_its_own():
    for table in ("2", "7", "8"):
        columns = [r.column for r in select_recipes("llava-steering", table)]
        assert columns == STEERING_TASKS * (len(columns) // 4)
    columns = [r.column for r in select_recipes("llava-steering", "3")]
    assert columns == ["SciQA-IMG", "VizWiz", "IconQA"] * 18


@pytest.mark.parametrize("table", list(dict.fromkeys((r.paper, r.table) for r in RECIPES)))
def test_every_string_is_a_run_with_the_papers_parameters(table):
    for recipe in select_recipes(*table):
        assert recipe.config or recipe.attach or recipe.remark
        if recipe.config:
            load_config(recipe.config)
            if recipe.table == "Figure 4" and "visual 6" not in recipe.row:
                continue  # one row of the grid of ranks is counted
            config, report, base = resolved(recipe)
            assert config.epochs or config.steps or config.samples
            share = recipe.printed.endswith("%")
            if share:
                assert base == LLAVA_V1
            value = report.trainable / base if share else report.trainable_in_llm
            if recipe.printed:
                assert agrees(recipe.printed, value) != (recipe.printed in COUNTED), recipe
            if recipe.printed in COUNTED:
                assert COUNTED[recipe.printed] == round(value * base if share else value)
                assert recipe.remark == NOT_REPRODUCED[recipe.printed]
        if recipe.attach:
            spec = recipe.attach.replace("vector=", "alpha=2,vector=")
            spec = re.sub(r"vector=[^,]*,", "", spec)  # a file of the reader's
            assert count_parameters(mllm_config("llava-1.5-7b"), spec, ()).trainable == 0


def test_every_evaluation_is_known():
    for tasks in {recipe.tasks for recipe in RECIPES if recipe.tasks}:
        known = [*benchmark_names(), "hellaswag", "mmlu"]
        assert set(expand_presets(tasks.split(","))) <= set(known), tasks


def test_what_the_baselines_leave_out_is_theirs():
    dropout = {
        recipe.config: load_config(recipe.config).tuning
        for recipe in RECIPES
        if "tuning=mores" in recipe.config
    }
    assert len(dropout) > 40
    assert all("dropout=0.05" in spec for spec in dropout.values())
    rank = load_config("llava_steering:tuning=lora:rank=8")
    assert rank.tuning == "lora:rank=8,dropout=0.05"
    assert load_config("llava_steering:tuning=mores:rank=8,dropout=0").tuning.endswith("dropout=0")
    both = load_config("llava_steering:tuning=full/mores-base")
    assert (both.optimizer.lr, both.optimizer.lr_by_component) == (2e-5, "tuning=0.0002")
    assert both.tuning == "full/mores-base:dropout=0.05"
    assert load_config("llava_steering:tuning=full").optimizer.lr == 2e-5
    assert load_config("llava_steering:tuning=oft").tuning == "oft-legacy"


def test_the_connector_of_mrt_trains_with_the_baselines_only():
    for tuning, connector in {
        **dict.fromkeys(("mrt-paper", "mrt:rank=2", "reft", "loreft:rank=6"), ()),
        **dict.fromkeys(("lora:rank=4", "vpt", "mixlora", "m2pt"), ("connector",)),
        "full": ("connector", "vision"),
    }.items():
        assert load_config(f"mrt:tuning={tuning}").also_train == connector


def test_control_trains_its_editors_alone():
    for recipe in select_recipes("mrt", "2"):
        config, report, base = resolved(recipe)
        assert (report.trainable, base) == (364_692, LLAVA_V1)
        assert recipe.column.lower() == config.data["scenario"]
        assert f"({'abcde'[CLASSES.index(config.data['target'])]})" in recipe.row
    phrasings = {load_config(r.config).data["phrasing"] for r in select_recipes("mrt", "S9")}
    assert phrasings == {2}


def test_steering_is_at_the_last_layer_and_of_captions_at_the_twentieth():
    for table in "1234":
        for recipe in select_recipes("shift", table):
            (method,) = parse_spec(recipe.attach)
            assert isinstance(method, Steer)
            assert (method.layers, method.positions) == ("19" if table == "3" else "31", "all")
            assert recipe.tasks == ("coco_caption" if table == "3" else "vqav2")
            steer = re.search(r"--steer (\S+) --layers (\d+)", recipe.remark)
            assert steer
            key = method.vector.partition(".npz:")[2]
            assert parse_steering_task(steer[1]).name.replace("/", "-") == key
            assert steer[2] == method.layers
    printed = [recipe.printed for recipe in select_recipes("shift", "2")]
    assert [sum(map(int, counts.split("/"))) for counts in printed] == [5000] * 3


def test_minigpt_is_tuned_by_the_same_methods():
    """The editors' counts follow from 39 blocks of 1,408 features and an LLM of 4,096."""
    found = {}
    for recipe in select_recipes("mrt", "S5")[5:]:
        config, report, base = resolved(recipe)
        found[recipe.row.removeprefix("MiniGPT-v2").strip()] = report.trainable
        assert base == MINIGPT_V2
        assert config.template == "minigpt_v2"
    visual, connector, text = (2 * d * r + r for d, r in ((1408, 6), (4096, 6), (4096, 4)))
    assert found["MRT"] == 39 * visual + connector + 2 * 32 * text == 2_805_744
    assert found["ReFT"] == 2 * 32 * text
    linear = 4 * 1408 * 4096 + 4096
    ranks = 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11_008))
    assert found["LoRA"] == ranks + linear
    assert (found["MixLoRA"], found["M2PT"]) == (99_487_744, 157_315_328)
    assert found[""] == base


def test_the_halves_of_mrt_overlap_in_one_layer():
    first, latter = (load_config(select_recipes("mrt", "3")[n].config).tuning for n in (2, 3))
    assert first == "mrt:layers=0-15,visual_layers=0-11"
    assert latter == "mrt:layers=15-31,visual_layers=11-22"


def test_the_command_lists_them(capsys):
    assert main(["recipes", "mrt", "3", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [recipe["row"] for recipe in listed] == ROWS["mrt", "3"]
    assert main(["recipes", "llava-steering", "10"]) == 0
    assert "tuning=mores-large:layers=deep" in capsys.readouterr().out
    assert main(["recipes", "mrt", "11"]) == 2
    assert "unknown table '11'; choose from: 1, 2," in capsys.readouterr().err


def test_an_unknown_paper_names_those_there_are():
    with pytest.raises(UserError, match="unknown paper 'x'; choose from: llava-steering, mrt"):
        select_recipes("x")


def test_the_page_of_the_docs_is_what_the_command_prints(capsys):
    assert main(["recipes", "--markdown"]) == 0
    page = Path(__file__).parents[2] / "docs" / "reference" / "recipes.md"
    assert page.read_text() == capsys.readouterr().out


def test_the_page_on_reproducing_names_runs_of_the_tables():
    page = Path(__file__).parents[2] / "docs" / "how-to" / "reproduce.md"
    configs = re.findall(r"--config (\S+)", page.read_text())
    assert len(configs) == 4
    known = {recipe.config for recipe in RECIPES}
    for config in configs:
        string = config.removesuffix(",start=../mores-3b")
        string = string.replace("llava_steering:stage=task", "llava_steering:size=3b,stage=task")
        assert string in known or "stage=pretrain" in string
