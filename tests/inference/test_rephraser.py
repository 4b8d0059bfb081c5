"""A text LLM that is tuned on pairs of questions rephrases them."""

import dataclasses

from run_helpers import TEXT_ONLY, config_of

from moresjax.data.control.questions import DIGITS
from moresjax.data.control.rephrase import rephrase
from moresjax.data.digits import WORDS
from moresjax.inference.load import load
from moresjax.inference.rephraser import ModelRephraser
from moresjax.training.loop import train

SIZES = {f"model.llm.{key}_size": 32 for key in ("hidden", "intermediate")}


def test_a_tuned_llm_rephrases(tmp_path):
    settings = TEXT_ONLY | SIZES | {"steps": 100, "max_seq_len": 16, "batch_size": 16}
    config = config_of("stage=llm", settings | {"optimizer.lr": 1e-2})
    train(dataclasses.replace(config, data={"name": "rephrasing", "dataset": "digits"}), tmp_path)
    rephraser = ModelRephraser(load(tmp_path, template="bare"), max_new_tokens=8)
    asked, wanted = ([way.ask(name) for name in WORDS[:5]] for way in reversed(DIGITS.trained))
    assert [rephrase(rephraser, question) for question in asked] == wanted
