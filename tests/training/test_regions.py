"""`config.roi` in a training run, and what `data check` says of regions and marks."""

import json

import numpy as np
import pytest
from PIL import Image
from run_helpers import TINY, assert_equal_weights

from moresjax.cli import main
from moresjax.core.json_files import read_object
from moresjax.inference.load import load
from moresjax.runs.init_weights import trained_parameters

QUESTION, MIDDLE = "<image>\nis there a two ?", [0.25, 0.25, 0.75, 0.75]
TUNING = "noreft:site=vision.block.out,rank=1,positions=roi/noreft:rank=1,positions=mark(n)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA file of eight samples with boxes and marks."""
    folder, rng = tmp_path_factory.mktemp("regions"), np.random.default_rng(0)
    records = []
    for number in range(8):
        pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        said = [("human", QUESTION), ("gpt", "yes" if number % 2 else "no")]
        records.append(
            {
                "id": str(number),
                "image": f"{number}.png",
                "conversations": [{"from": role, "value": text} for role, text in said],
                "roi": MIDDLE,
                "marks": {"n": "two"},
            }
        )
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "own.py").write_text(CONFIG.replace("FOLDER", str(folder)))
    return folder


CONFIG = """
from moresjax.configs import digits

def get_config(arg=None):
    config = digits.get_config("stage=finetune")
    config.data = {"name": "llava", "files": "FOLDER/data.json", "image_root": "FOLDER"}
    config.also_train, config.optimizer.lr_by_component = (), ""
    config.num_workers = 1
    config.steps, config.log_every, config.max_seq_len = 2, 2, 32
    return config
"""


def arguments(folder, **changes) -> list[str]:
    """The options that name the configuration."""
    changes = TINY | {"tuning": TUNING} | changes
    return ["--config", f"{folder}/own.py", *(f"--config.{k}={v}" for k, v in changes.items())]


def test_a_run_trains_on_the_regions_of_its_config(folder):
    """Those of a provider are those that the samples say, and not those of another."""
    command = ["sweep", *arguments(folder), "--grid", "roi=boxes;center(50%);all"]
    assert main([*command, "--workdir", str(folder / "runs")]) == 0
    runs = {read_object(x)["roi"]: x.parent for x in (folder / "runs").glob("*/config.json")}
    assert_equal_weights(runs["boxes"], runs["center(50%)"])
    own, other = (trained_parameters(runs[roi]) for roi in ("boxes", "all"))
    assert any(np.abs(own[name] - other[name]).max() > 1e-4 for name in own)
    assert str(load(runs["center(50%)"]).processor.regions) == "center(50%)"


def test_data_check_lists_what_is_wrong_with_regions_and_marks(folder, tmp_path, capsys):
    records = json.loads((folder / "data.json").read_text())
    changes = [{}, {"roi": None}, {"roi": [0, 0, 1.5, 1]}, {"marks": {}}, {"marks": {"n": "nine"}}]
    changes += [{"roi": []}, {"conversations": records[0]["conversations"][:1]}]
    bad = [record | change for record, change in zip(records, changes, strict=False)]
    (tmp_path / "data.json").write_text(json.dumps(bad))
    options = [f"--config.data.files={tmp_path}/data.json", "--workers", "1", "--json"]
    assert main(["data", "check", *arguments(folder), *options]) == 0
    found = json.loads(capsys.readouterr().out)["bad"]
    told = {
        "1": "the tuning acts on a region of interest (roi), but nothing is said of it",
        "2": "the box (0, 0, 1.5, 1) must lie in the image",
        "3": "the tuning acts on mark(n), but nothing is marked so",
        "4": "mark 'n' is not in the text: no question has 'nine'",
        "6": "roles must be human and gpt in turn",
    }
    assert found.keys() == told.keys()
    assert all(message in found[number] for number, message in told.items())
    # A provider says where the regions are, so that only marks and bad boxes are left.
    assert main(["data", "check", *arguments(folder, roi="all"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["bad"].keys() == {"2", "3", "4", "6"}
    assert main(["data", "check", *arguments(folder, roi="middle"), *options]) == 2
    assert "unknown roi 'middle'; choose from: boxes, all" in capsys.readouterr().err
