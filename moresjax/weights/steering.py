"""What LLaVA Steering's code (bibisbar/LLaVA-Steering, 045cd2d) notes beside its MoReS edits.

A run of that code has its edits in `mores/language_model`, in pyreft's layout with another type,
and there too `mores_pos_configs.json` with the tokens and `intervention_config.json` with what the
edits are made from. Which tokens the code really edits is a matter of its own: see
docs/reference/methods.md.
"""

import json
import re
from pathlib import Path
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.core.json_files import read_object, write_json
from moresjax.tuning.base import Method
from moresjax.tuning.methods.mores import MoReS

MORES = "tinyllava.model.intervention_models.MoReSIntervention"
PLACE = "mores/language_model"
POSITIONS, EDITS = "mores_pos_configs.json", "intervention_config.json"
# Every key of the notes on positions.
KEYS = ConfigKeys(
    implemented=("intervene_modality", "intervention_positions", "mores_share_weights"),
    choices={"intervened_prompt_part": ("first_round",)},
    irrelevant={
        "num_interventions": "config.json lists the edits",
        "img_embed_token_len": "the model's own",
    },
)
# Every key of what the edits are made from, of an entry of its list, and of that entry's edit.
EDITS_KEYS = ConfigKeys(implemented=("representations",))
ENTRY_KEYS = ConfigKeys(
    implemented=("intervention", "low_rank_dimension"),
    choices={"component": ("block_output",)},
    irrelevant={"layer": "config.json lists the layers"},
)
EDIT_KEYS = ConfigKeys(
    implemented=("low_rank_dimension", "dropout"),
    choices={"type": ("mores",)},
    irrelevant={"embed_dim": "the tensors' shapes are checked"},
)
# Their names of what is edited, and our regions.
_REGIONS = {"vis": "image", "text": "question"}


def noted_positions(folder: Path, count: int) -> list[str]:
    """The selector of each edit of a layer, from what is noted or else as the paper has it.

    Args:
      folder: The folder of the edits.
      count: How many edits a layer has; two are for the first and the last tokens.

    Raises:
      UserError: for tokens that no selector is.
    """
    file = folder / POSITIONS
    noted: Any = json.loads(file.read_text()) if file.is_file() else {}
    region, tokens = "image", "f4+l5"
    if noted:
        known = isinstance(noted, dict)
        KEYS.check(noted if known else {}, str(file))
        region = _REGIONS.get(str(noted.get("intervene_modality")), "") if known else ""
        tokens = noted.get("intervention_positions", "") if known else ""
        if known and noted.get("mores_share_weights") is (count == 2):
            raise UserError(f"{file} says mores_share_weights={count == 2}, with {count} edits")
    ends, even = re.fullmatch(r"f(\d+)\+l(\d+)", tokens), re.fullmatch(r"uniform(\d+)", tokens)
    if region and ends and count == 2:
        return [f"{region}:f{ends[1]}+l0", f"{region}:f0+l{ends[2]}"]
    if region and ends and count == 1:
        return [f"{region}:{tokens}"]
    if region and even and count == 1:
        return [f"{region}:uniform({even[1]})"]
    raise UserError(f"{file} names tokens that no selector is; say them with --edits")


def noted_dropout(folder: Path, ranks: set[int]) -> float:
    """The dropout that edits trained with, from what is noted; 0 without a note.

    Args:
      folder: The folder of the edits.
      ranks: The ranks of the edits' tensors.

    Raises:
      UserError: for a note that is damaged, contradicts the tensors or would be ignored.
    """
    file = folder / EDITS
    if not file.is_file():
        return 0.0
    values = read_object(file)
    EDITS_KEYS.check(values, str(file))
    found: set[float] = set()
    entries = values.get("representations")
    for entry in entries if isinstance(entries, list) else [entries]:
        edit = entry.get("intervention") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(edit, dict):
            raise UserError(f"{file} must list entries with an intervention, it has {entry}")
        ENTRY_KEYS.check(entry, str(file))
        EDIT_KEYS.check(edit, str(file))
        for rank in (entry.get("low_rank_dimension"), edit.get("low_rank_dimension")):
            if rank is not None and rank not in ranks:
                tensors = " and ".join(map(str, sorted(ranks)))
                raise UserError(f"{file} says low_rank_dimension={rank}, the edits have {tensors}")
        dropout = edit.get("dropout") or 0.0
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise UserError(f"{file}: dropout={dropout} is no number")
        found.add(float(dropout))
    if len(found) > 1:
        raise UserError(f"{file}: edits with different dropout, {sorted(found)}")
    return found.pop()


def unnoted(method: Method) -> str:
    """What of a method their code has no place for; empty if it has one for all.

    >>> unnoted(MoReS()), unnoted(MoReS(positions="prompt"))
    ('', 'mores at the tokens prompt')
    """
    if not isinstance(method, MoReS) or method.site != "llm.block.out":
        return method.name
    return "" if _noted(method) else f"mores at the tokens {method.positions}"


def _noted(method: MoReS) -> dict[str, str]:
    regions = {ours: theirs for theirs, ours in _REGIONS.items()}
    region, _, tokens = method.positions.partition(":")
    if m := re.fullmatch(r"uniform\((\d+)\)", tokens):
        tokens = f"uniform{m[1]}"
    if region not in regions or not re.fullmatch(r"f\d+\+l\d+|uniform\d+", tokens):
        return {}
    return {"intervene_modality": regions[region], "intervention_positions": tokens}


def note(method: MoReS, layers: int, dim: int, visual_tokens: int, folder: Path) -> None:
    """Writes the notes beside edits.

    Args:
      method: The one method.
      layers: In how many layers it acts.
      dim: The LLM's hidden size.
      visual_tokens: The visual tokens of an image.
      folder: The folder of the edits.
    """
    positions = _noted(method) | {
        "mores_share_weights": True,
        "intervened_prompt_part": "first_round",
        "num_interventions": {"llm": layers},
        "img_embed_token_len": visual_tokens,
    }
    edit = {"type": "mores", "embed_dim": dim, "low_rank_dimension": method.rank}
    edit |= {"dropout": method.dropout}
    one = {"component": "block_output", "low_rank_dimension": method.rank, "intervention": edit}
    write_json(folder / POSITIONS, positions, indent=4)
    write_json(folder / EDITS, {"representations": [one] * layers}, indent=4)
