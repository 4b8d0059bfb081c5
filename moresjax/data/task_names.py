"""Names of the tasks whose training files `moresjax data build` writes: one spelling for each."""

from moresjax.core.errors import choice_error

# What LLaVA Steering tunes single models for comes first.
TASK_NAMES = (
    *("scienceqa", "vizwiz", "iconqa_txt", "iconqa_blank"),
    *("flickr30k", "okvqa", "textcaps", "vqav2"),
    *("vg_color", "vg_place", "vg_sentiment"),
)


def task_name(name: str) -> str:
    """The one spelling of a task's name, from any that papers and earlier versions use.

    >>> task_name("iconQA-txt"), task_name("iconQA_blank"), task_name("ScienceQA")
    ('iconqa_txt', 'iconqa_blank', 'scienceqa')
    """
    return name.lower().replace("-", "_")


def check_task(name: str) -> str:
    """The one spelling of a built-in task's name.

    Raises:
      UserError: There is no such task.
    """
    if (known := task_name(name)) not in TASK_NAMES:
        raise choice_error("task", name, TASK_NAMES)
    return known
