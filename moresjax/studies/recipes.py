"""The papers' tables as runs: for every cell the config string that trains what it reports.

    llava-steering   LLaVA Steering (2024), Tables 1-4 and 6-10; Table 5 compares features
    mrt              Re-Imagining Multimodal Instruction Tuning (2025), Tables 1-3, S3, S5-S11
    shift            Analyzing Fine-tuning Representation Shift (2025), Tables 1-4

`moresjax recipes` lists them; `docs/how-to/reproduce.md` says what they assume.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from moresjax.core.errors import choice_error
from moresjax.data.control.attributes import ATTRIBUTES
from moresjax.data.control.questions import OBJECTS

# Printed counts that no reading of the method gives, and what is counted here.
NOT_REPRODUCED = {
    "1.340M": "the count is 1.311M, twice that of rank 4",
    "83M": "the count is 83.9M, printed without its decimal",
    "0.85%": (
        "the released setup, two routers of 16 factors, and the connector are 1.14%; one router "
        "is 0.83%, with the connector 0.89%"
    ),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One cell of a table, or one row whose cells come from a single run.

    Attributes:
      paper: `llava-steering`, `mrt` or `shift`.
      table: The table's number in the paper.
      row: The row's name there; for tables in blocks the block's name stands before it.
      column: The column's name; empty where all columns are of one run.
      config: The config string of the run, `NAME:ARGUMENTS`; empty where nothing trains.
      tasks: What the run is evaluated on, as `moresjax evaluate --tasks` takes it.
      printed: The trainable parameters that the paper prints, or their share; of steering its
        counts of answers by type; empty: none.
      attach: The tuning that is attached to the base model where nothing trains.
      remark: Why there is no run, or how it is not the paper's.
    """

    paper: str
    table: str
    row: str
    column: str = ""
    config: str = ""
    tasks: str = ""
    printed: str = ""
    attach: str = ""
    remark: str = ""


# LLaVA Steering ------------------------------------------------------------------------------

# Row, tuning, and what trains in the LLM of 3B, 7B and 13B as printed.
STEERING_METHODS = {
    "FT": ("full", "2.78B", "", ""),
    "Adapter": ("adapter", "83M", "201.3M", "314.6M"),
    "LoRA": ("lora", "188.74M", "319.8M", "500.7M"),
    "OFT": ("oft", "39.32M", "100.7M", "196.6M"),
    "IA3": ("ia3", "0.492M", "0.614M", "0.963M"),
    "MoReS-B": ("mores-base", "0.164M", "0.262M", "0.410M"),
    "MoReS-L": ("mores-large", "0.328M", "", ""),
    "MoReS-H": ("mores-huge", "0.655M", "", ""),
}
# Column: the task's file, and what is evaluated. Table 3 has one column of IconQA, whose numbers
# are those of Table 2's fill-in-the-blank task.
TASKS = {
    "SciQA-IMG": ("scienceqa", "scienceqa_img_ft"),
    "VizWiz": ("vizwiz", "vizwiz_ft"),
    "IconQA-txt": ("iconqa_txt", "iconqa_txt"),
    "IconQA-blank": ("iconqa_blank", "iconqa_blank"),
    "IconQA": ("iconqa_blank", "iconqa_blank"),
}
COLUMNS = ("SciQA-IMG", "VizWiz", "IconQA-txt", "IconQA-blank")
SCALED_COLUMNS = ("SciQA-IMG", "VizWiz", "IconQA")
SCALES = {"Small": "1000", "Medium": "5000", "Large": "10000"}
RANKS = {"1": "0.164M", "2": "0.328M", "4": "0.655M", "8": "1.340M"}
RATIOS = {"1%": "f4+l5", "25%": "25%", "50%": "50%", "100%": "100%"}
INTERVALS = {"[0,2,4,]": "every:2", "[0,3,6,]": "every:3", "[0,4,8,]": "every:4"}
THIRDS = {"Shallow (0-15)": "shallow", "Middle (8-23)": "middle", "Deep (16-31)": "deep"}


TEXT_ONLY = {"LoRA": "lora", "Adapter": "adapter", "OFT": "oft", "IA3": "ia3"}
TEXT_ONLY |= {"MoReS (Ours)": "mores-base"}
# POPE of the last is that of MoReS-H in Table 1.
HALLUCINATION = {"Full": "full", "LoRA": "lora", "Adapter": "adapter", "OFT": "oft", "IA3": "ia3"}
HALLUCINATION |= {"MoReS": "mores-huge"}


def _multi_task() -> Iterator[Recipe]:
    """Tables whose runs are tuned on the 665k mix."""

    def recipe(table: str, row: str, tuning: str, tasks: str, printed: str = "") -> Recipe:
        config = f"llava_steering:size=3b,stage=finetune,tuning={tuning}"
        return Recipe("llava-steering", table, row, config=config, tasks=tasks, printed=printed)

    for row, (tuning, printed, *_) in STEERING_METHODS.items():
        yield recipe("1", row, tuning, "mores-table1", printed)
    for row, tuning in TEXT_ONLY.items():
        yield recipe("4", row, tuning, "hellaswag,mmlu")
    for row, tuning in HALLUCINATION.items():
        yield recipe("6", row, tuning, "mores-table6")
    for table, layers in {"9": INTERVALS, "10": THIRDS}.items():
        for row, choice in (layers | {"All Layer": ""}).items():
            tuning = "mores-large" + (f":layers={choice}" if choice else "")
            yield recipe(table, row, tuning, "mores-table1")


def _task_specific() -> Iterator[Recipe]:
    """Tables with a run per cell, each tuned on a task."""

    def recipe(
        table: str, row: str, column: str, tuning: str, printed: str = "", **changes: str
    ) -> Recipe:
        options = {"size": "3b", "samples": "10000"} | changes
        task, tasks = TASKS[column]
        config = (
            f"llava_steering:size={options['size']},stage=task,task={task},"
            f"samples={options['samples']},tuning={tuning}"
        )
        fields = {"config": config, "tasks": tasks, "printed": printed}
        return Recipe("llava-steering", table, row, column, **fields)

    for number, size in enumerate(("3b", "7b", "13b")):
        for method, column in itertools.product(
            ("Adapter", "LoRA", "OFT", "IA3", "MoReS-B"), COLUMNS
        ):
            tuning, *printed = STEERING_METHODS[method]
            row = f"LLaVA Steering-{size.upper()} {method}"
            yield recipe("2", row, column, tuning, printed[number], size=size)
    for (scale, samples), method, column in itertools.product(
        SCALES.items(), ("FT", "Adapter", "LoRA", "OFT", "IA3", "MoReS-L"), SCALED_COLUMNS
    ):
        tuning, printed, *_ = STEERING_METHODS[method]
        yield recipe("3", f"{scale} {method}", column, tuning, printed, samples=samples)
    for (rank, printed), column in itertools.product(RANKS.items(), COLUMNS):
        yield recipe("7", rank, column, f"mores:rank={rank}", printed)
    for (ratio, positions), column in itertools.product(RATIOS.items(), COLUMNS):
        yield recipe("8", ratio, column, f"mores-base:positions=image:{positions}")


# MRT -----------------------------------------------------------------------------------------

PROMPT_LENGTHS = "the paper gives no lengths; these have the printed share"
# Row, tuning, printed share of the model's parameters, remark.
MRT_METHODS = {
    "LLaVAFT": ("full", "100%", ""),
    "LoRA": ("lora", "0.63%", ""),
    "APrompt": ("aprompt:length=50,kv_length=20", "0.23%", PROMPT_LENGTHS),
    "PTUM": ("ptum:length=32", "0.12%", PROMPT_LENGTHS),
    "VPT": ("vpt:length=10", "0.06%", PROMPT_LENGTHS),
    "ReFT": ("reft", "0.03%", ""),
    "M2PT": ("m2pt:visual_length=10,length=20", "1.96%", PROMPT_LENGTHS),
    "MixLoRA": ("mixlora:factors=16", "0.85%", ""),
    "MRT": ("mrt-paper", "0.03%", ""),
}
DEPTHS = {
    "(a) First Layer": "layers=0,visual_layers=0",
    "(b) Odd Layers": "layers=every:2,visual_layers=every:2",
    "(c) First Half": "layers=0-15,visual_layers=0-11",
    "(d) Latter Half": "layers=15-31,visual_layers=11-22",
    "(e) All Layers": "",
}
SEGMENTS = {
    "Prefix Only": "mrt:groups=visual;connector;prefix",
    "Suffix Only": "mrt:groups=visual;connector;suffix",
    "Prefix & Suffix": "mrt-paper",
    "All": "mrt:text=all",
}
COMPONENTS = {
    "LLM": "mrt:groups=prefix;suffix",
    "Cross-modality": "mrt:groups=connector",
    "Vision encoder": "mrt:groups=visual",
    "All (MRT)": "mrt-paper",
}
CLASSES = ("cat", "dog", "ship", "frog", "truck")
# Which class an image of each is to be taken for; the paper does not say.
TAKEN_FOR = dict(zip(CLASSES, (*CLASSES[1:], CLASSES[0]), strict=True))
SAMPLED = "the paper prints neither the region nor a learning rate; `analyze control` measures it"
MISALIGNED = "the paper names neither the other class nor the question"

EXTRA = {
    "S5": (("LLaVAFT", "LoRA", "MixLoRA", "M2PT", "MRT"), "seed_bench,gqa"),
    "S7": (("M2PT", "MixLoRA", "VPT", "LoRA", "MRT"), "mme_sampled"),
    "S8": (("LLaVAFT", "VPT", "LoRA", "M2PT", "MixLoRA", "MRT"), "mme_sampled"),
}
# Table S5's second half, on another base.
MINIGPT = ("LoRA", "ReFT", "MixLoRA", "M2PT", "MRT")
MINIGPT_FULL = "the row has no name of its own; read as full tuning, like LLaVAFT"
WITHOUT = {
    "without vision": "mrt:groups=connector;prefix;suffix",
    "without cross-modality": "mrt:groups=visual;prefix;suffix",
    "without multimodal": "mrt:groups=visual;connector",
}


def _mrt_recipe(
    table: str, row: str, tuning: str, tasks: str = "mrt-table1", **more: str
) -> Recipe:
    return Recipe("mrt", table, row, config=f"mrt:tuning={tuning}", tasks=tasks, **more)


def _mrt() -> Iterator[Recipe]:
    align = "the base model: nothing trains"
    yield Recipe("mrt", "1", "LLaVAAlign", tasks="mrt-table1", remark=align)
    for row, (tuning, printed, remark) in MRT_METHODS.items():
        yield _mrt_recipe("1", row, tuning, printed=printed, remark=remark)
    for row, layers in DEPTHS.items():
        remark = "the text says even-numbered layers" if "Odd" in row else ""
        yield _mrt_recipe("3", row, f"mrt:{layers}" if layers else "mrt-paper", remark=remark)
    for table, (rows, tasks) in EXTRA.items():
        for row in rows:
            yield _mrt_recipe(table, row, MRT_METHODS[row][0], tasks)
    for row in ("", *MINIGPT):
        tuning = MRT_METHODS[row][0] if row else "full"
        config, remark = f"mrt:base=minigpt-v2,tuning={tuning}", "" if row else MINIGPT_FULL
        name = f"MiniGPT-v2 {row}".strip()
        yield Recipe("mrt", "S5", name, config=config, tasks="mme_sampled", remark=remark)


def _mrt_control() -> Iterator[Recipe]:
    """Tables 2, S9, S10 and S11."""

    def recipe(table: str, row: str, column: str, config: str, remark: str = SAMPLED) -> Recipe:
        return Recipe("mrt", table, row, column, config=f"control:{config}", remark=remark)

    for table, phrasing in {"2": "", "S9": ",phrasing=2"}.items():
        for letter, name in zip("abcde", CLASSES, strict=True):
            row, asked = f"({letter}) {name}", f"target={name}{phrasing}"
            known = f"scenario=misclassification,{asked}"
            yield recipe(table, row, "Misclassification", known)
            known = f"scenario=misalignment,{asked},into={TAKEN_FOR[name]}"
            yield recipe(table, row, "Misalignment", known, MISALIGNED)
    for letter, name in zip("abc", ATTRIBUTES, strict=True):
        known = f"scenario=indeterminate,target={name}"
        yield recipe("S10", f"({letter}) {name}", "", known)
    for phrasing in OBJECTS.paraphrases:
        row = phrasing.text.replace("{e}", "an e")
        known = "scenario=misclassification,target=cat"
        yield recipe("S11", row, "", known, "asked by `analyze control --rephraser template`")


def _mrt_ablations() -> Iterator[Recipe]:
    for row, tuning in SEGMENTS.items():
        yield _mrt_recipe("S3", row, tuning, "mme_sampled")
    for row, tuning in COMPONENTS.items():
        yield _mrt_recipe("S6", row, tuning)
    for visual, rank in itertools.product(range(2, 9), range(2, 9)):
        tuning = f"mrt:rank={rank},visual_rank={visual}"
        row = f"visual {visual}, multimodal {rank}"
        yield _mrt_recipe("Figure 4", row, tuning, "mme_sampled")
    lengths = {f"length {n}": f"mrt:length={n}" for n in (2, 4, 6, 8, 10)}
    for row, tuning in (WITHOUT | lengths).items():
        yield _mrt_recipe("Figure 6", row, tuning)


# Representation shift ------------------------------------------------------------------------

# Folder and name of the vector, as `docs/reference/steering.md` makes them, and of what it is made.
TYPES = {
    "Yes/No": ("type-yes-no", "answer_type:yes-no", "answer_type:yes/no"),
    "Number": ("type-number", "answer_type:number", "answer_type:number"),
    "Other": ("type-other", "answer_type:other", "answer_type:other"),
}
ANSWERS = {
    "Yes (Yes/No)": ("steered", "yes>no"),
    "Number": ("steered-3", "1>3"),
    "Other": ("steered-black", "white>black"),
}
STYLES = {"colors": "coloured", "places": "placed", "sentiments": "felt"}
# Answers of type yes/no, number, other and none of these under steering, in the authors' notebook.
STEERED_COUNTS = {
    "yes>no": "1885/694/2294/127",
    "1>3": "1859/670/2349/122",
    "white>black": "1862/671/2311/156",
}
STEERED_MODEL = "LLaVA-1.5 7B; `moresjax analyze steer --steer {} --layers {}`: mean state {}"


def _steered(table: str, row: str, folder: str, key: str, **more: str) -> Recipe:
    layer, tasks = ("19", "coco_caption") if table == "3" else ("31", "vqav2")
    attach = f"steer:vector={folder}/vectors.npz:{key},layers={layer},positions=all"
    how = STEERED_MODEL.format(more.pop("steer", f"answers:{key}"), layer, more.pop("made"))
    return Recipe("shift", table, row, tasks=tasks, attach=attach, remark=how, **more)


def _shift() -> Iterator[Recipe]:
    answered = "at the target's answer minus that at the source's"
    for row, (folder, key, steer) in TYPES.items():
        made = "of questions of the type minus that of the others"
        yield _steered("1", row, folder, key, steer=steer, made=made)
    for row, (folder, key) in ANSWERS.items():
        yield _steered("2", row, folder, key, made=answered, printed=STEERED_COUNTS[key])
    for row, folder in STYLES.items():
        made = "at words of the list minus that of all captions"
        key = f"style:{row}"
        yield _steered("3", row, folder, key, steer=key, made=made)
    for row, name in {"Yes to No": "Yes (Yes/No)", "White to Black": "Other"}.items():
        yield _steered("4", row, *ANSWERS[name], made=answered)


PAPERS = ("llava-steering", "mrt", "shift")


def _place(recipe: Recipe) -> tuple[int, str, int]:
    """Where a recipe's table stands: tables, those of an appendix, figures."""
    kind, number = re.fullmatch(r"(\D*)(\d+)", recipe.table).groups()  # pyright: ignore
    return PAPERS.index(recipe.paper), {"": "", "S": "A"}.get(kind, "B"), int(number)


def _remarked(recipe: Recipe) -> Recipe:
    known = NOT_REPRODUCED.get(recipe.printed, "")
    return dataclasses.replace(recipe, remark=recipe.remark or known)


RECIPES: tuple[Recipe, ...] = tuple(
    sorted(
        map(
            _remarked,
            (
                *_multi_task(),
                *_task_specific(),
                *_mrt(),
                *_mrt_control(),
                *_mrt_ablations(),
                *_shift(),
            ),
        ),
        key=_place,
    )
)


def select_recipes(paper: str = "", table: str = "") -> tuple[Recipe, ...]:
    """The recipes of a paper, of one of its tables, or of all papers.

    Example:
      >>> [recipe.row for recipe in select_recipes("llava-steering", "9")]
      ['[0,2,4,]', '[0,3,6,]', '[0,4,8,]', 'All Layer']

    Raises:
      UserError: for an unknown paper or table; names those there are.
    """
    if paper and paper not in PAPERS:
        raise choice_error("paper", paper, PAPERS)
    found = tuple(recipe for recipe in RECIPES if paper in ("", recipe.paper))
    tables = dict.fromkeys(recipe.table for recipe in found)
    if table and table not in tables:
        raise choice_error("table", table, tables)
    return tuple(recipe for recipe in found if table in ("", recipe.table))


TITLES = {
    "llava-steering": "LLaVA Steering",
    "mrt": "MRT: a representation view",
    "shift": "Representation shift",
}


def markdown(recipes: Sequence[Recipe]) -> str:
    """Recipes as a page of tables, one for every table of a paper."""
    lines = [
        "# Recipes",
        "",
        "What `moresjax recipes --markdown` prints: the run behind every cell.",
    ]
    lines.append("[Reproduce the papers](../how-to/reproduce.md) says how, and what is assumed.")
    paper = ""
    for (name, table), group in itertools.groupby(recipes, lambda r: (r.paper, r.table)):
        if name != paper:
            lines += ["", f"## {TITLES[name]}"]
            paper = name
        title = table if table.startswith("Figure") else f"Table {table}"
        lines += ["", f"### {TITLES[name].partition(':')[0]}, {title}", ""]
        lines += [
            "| row | column | run | evaluate | printed | remark |",
            "|---|---|---|---|---|---|",
        ]
        for r in group:
            run = r.config or (f"attach {r.attach}" if r.attach else "")
            spec = f"`{run}`" if run else ""
            cells = (r.row, r.column, spec, r.tasks, r.printed, r.remark)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
