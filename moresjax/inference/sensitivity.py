"""Derivatives of answers by hidden states, for concept sensitivity (TCAV).

Axis legend: L layers, N questions, D hidden size.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from moresjax.analysis.capture import check_site
from moresjax.analysis.sensitivity import state_gradients
from moresjax.core.errors import UserError
from moresjax.inference.model import Model
from moresjax.inference.prompt_inputs import PromptImages
from moresjax.sharding.mesh import use_mesh


def answer_gradients(
    model: Model,
    prompts: Sequence[str],
    images: Sequence[PromptImages],
    site: str = "llm.block.out",
    *,
    answer: str | None = None,
    against: str | None = None,
    batch_size: int = 8,
) -> Float[np.ndarray, "L N D"]:
    """Derivatives of the logit of an answer's first token by the state of the last prompt token.

    >>> from moresjax.testing import talking_model
    >>> asked = ["how many ?", "is there a two ?"]
    >>> answer_gradients(talking_model(), asked, [(), ()], answer="two").shape
    (2, 2, 16)

    Args:
      model: The model.
      prompts: What the user says.
      images: The image or images of each prompt.
      site: A site of the LLM.
      answer: The answer; default: the model's own first token.
      against: Another answer, the logit of whose first token is subtracted.
      batch_size: The rows of a batch.

    Raises:
      UserError: There are no prompts, the site is not one of the LLM, both answers begin with the
        same token, or there is only an answer to subtract.
    """
    check_site(site, model.config)
    if not site.startswith("llm."):
        raise UserError(f"{site!r} has no state of a prompt's last token; choose a site of the LLM")
    if answer is None and against is not None:
        raise UserError("against needs the answer that it is subtracted from")
    if not prompts or len(prompts) != len(images):
        raise UserError(f"sensitivities of {len(prompts)} prompts with images of {len(images)}")
    heads, ids = [], []
    for prompt, own in zip(prompts, images, strict=True):
        head, two = model.prompts.row(prompt, own), [0, 0]
        if answer is not None:
            pairs = [
                model.prompts.with_answer(head, prompt, own, text)
                for text in (answer, answer if against is None else against)
            ]
            head, two = pairs[0][0], [int(tokens[0]) for _, tokens in pairs]
            if against is not None and two[0] == two[1]:
                raise UserError(f"{answer} and {against} begin with the same token")
        heads.append(head)
        ids.append(two)
    signs = (1.0, 0.0 if against is None else -1.0)
    found, longest = [], max(map(len, heads))
    for start in range(0, len(heads), batch_size):
        chunk = heads[start : start + batch_size]
        padded = [*chunk, *[chunk[-1]] * (batch_size - len(chunk))]  # one program for all batches
        batch = model.service.batch(padded, longest)
        places = np.asarray([len(row) - 1 for row in padded])
        two = ids[start : start + batch_size]
        two = np.asarray([*two, *[two[-1]] * (batch_size - len(two))])
        with use_mesh(model.mesh):
            own = state_gradients(
                model.mllm, batch, site, places, None if answer is None else two, signs
            )
        found.append(own[:, : len(chunk)])
    return np.concatenate(found, axis=1)
