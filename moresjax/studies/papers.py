"""All studies by name."""

from collections.abc import Sequence

from moresjax.core.errors import choice_error
from moresjax.studies import (
    causes,
    control,
    landscape,
    llava_steering,
    more_tokens_and_layers,
    mrt,
    representations,
    steered,
    tasks,
)
from moresjax.studies.study import STAGE_MINUTES, Study

_PAPERS = (
    llava_steering,
    tasks,
    more_tokens_and_layers,
    steered,
    mrt,
    representations,
    landscape,
    control,
    causes,
)
STUDIES = {study.name: study for paper in _PAPERS for study in paper.STUDIES}
ALL = "all"


def select_studies(name: str) -> Sequence[Study]:
    """The study of a name, or `all` of them.

    >>> [study.name for study in select_studies("table7")]
    ['table7']

    Raises:
      UserError: There is no such study.
    """
    if name == ALL:
        return list(STUDIES.values())
    if name not in STUDIES:
        raise choice_error("study", name, (*STUDIES, ALL))
    return [STUDIES[name]]


def list_studies(seeds: int = 5) -> str:
    """A line per study, with its budget on two cores."""
    lines = [
        f"{study.name:13s} {study.minutes * seeds:4.0f} min  {study.title}"
        for study in STUDIES.values()
    ]
    return "\n".join(
        [
            *lines,
            f"minutes are about those of two quiet cores with {seeds} seeds, when no run is there "
            f"yet but stages 0 and 1, which most share and which take {STAGE_MINUTES * seeds:.0f}; "
            "table8, 9 and 10 have stages of their own, which are counted; table1, fig1, 2 and 4 "
            "share their runs with each other, and some with table4, 6 and 7",
        ]
    )
