"""VPT: learned tokens in the vision encoder (Jia et al. 2022).

Axis legend: P virtual tokens, C class token and registers, X patches, D features.

    h_l = block_l([C_{l-1}; P_l; X_{l-1}])      deep
    h_1 = block_1([C_0; P; X_0])                shallow

The learned tokens are dropped before the connector. They have no positions, so it does not matter
where among the encoder's other tokens they stand.
"""

import dataclasses

from jaxtyping import PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.tuning.base import ModelConfig, Params, Sites, VirtualTokens, register
from moresjax.tuning.methods.ptum import uniform_tokens
from moresjax.tuning.spec import check_choice


@register
@dataclasses.dataclass(frozen=True)
class VPT(VirtualTokens):
    """`length` learned tokens in the blocks of the vision encoder that run.

    Attributes:
      deep: whether every block has its own; otherwise the first block only.
      init: `patch`: uniform within `sqrt(6 / (3 patch_size^2 + D))`, as for a patch embedding;
        `xavier`: within `sqrt(6 / (P + D))`.
    """

    name = "vpt"
    deep: bool = True
    init: str = "patch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "init", ("patch", "xavier"))

    def sites(self, config: ModelConfig) -> Sites:
        vision = config.vision
        if vision is None or vision.is_pair:
            has = "has none" if vision is None else "has two"
            raise UserError(f"{self.name} needs one vision encoder; this model {has}")
        fan_in = 3 * vision.patch_size**2 if self.init == "patch" else self.length
        site = "vision.block.in" if self.deep else "vision.embed"
        return {site: (vision.hidden_size, fan_in)}

    def initial(self, key: PRNGKeyArray, dim: int, fan_in: int) -> Params:
        return {"embedding": uniform_tokens(key, self.length, dim, fan_in)}
