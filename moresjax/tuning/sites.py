"""Sites: the named places of a model where methods act, checked against a model's configuration.

Edits:    vision.block.{out,attn.out,mlp.out}  connector.out  llm.embed.out
          llm.block.{out,attn.out,mlp.out}  llm.norm.out
Linears:  {vision,llm}.block.{q,k,v,o,gate,up,down}  connector.{0,1,...}
"""

from collections.abc import Collection, Mapping

from moresjax.core.errors import UserError, choice_error
from moresjax.tuning.base import Edit, Method, ModelConfig
from moresjax.tuning.selectors import parse_selector

_BLOCK_OUTPUTS = ("out", "attn.out", "mlp.out")
EDIT_SITES = (
    *(f"vision.block.{o}" for o in _BLOCK_OUTPUTS),
    "connector.out",
    "llm.embed.out",
    *(f"llm.block.{o}" for o in _BLOCK_OUTPUTS),
    "llm.norm.out",
)


def edit_dim(method: Method, site: str, config: ModelConfig) -> int:
    """Features of the activations at a site.

    Raises:
      UserError: for an unknown site, or one of a vision encoder that the model does not have or
        has two of.
    """
    if site not in EDIT_SITES:
        raise choice_error(f"site of {method.name}", site, EDIT_SITES)
    if not site.startswith("llm.") and config.vision is None:
        raise UserError(f"{method.name}: site {site!r} needs a vision encoder; this model has none")
    if site.startswith("vision.") and config.vision.is_pair:
        raise UserError(
            f"{method.name}: site {site!r} needs one vision encoder; this model has two"
        )
    return config.vision.hidden_size if site.startswith("vision.") else config.llm.hidden_size


# Regions that tokens outside the LLM belong to; `system` is the class token and the registers.
_REGIONS = {"vision": ("image", "roi", "system", "all"), "connector": ("image", "roi", "all")}


def check_selector(method: Edit, site: str, config: ModelConfig) -> None:
    """Checks the positions of an edit at a site.

    Raises:
      UserError: for a malformed selector, for one with a part that no token at this site, or no
        token of an image of this many, can match, and for `roi` with a connector of learned
        queries.
    """
    selector, tower = parse_selector(method.positions), site.split(".")[0]
    visual_tokens = config.vision.num_patches if tower == "vision" else config.visual_tokens
    for region, part in selector.parts:
        if region not in _REGIONS.get(tower, (region,)):
            raise choice_error(f"region of {method.name} at {site}", region, _REGIONS[tower])
        if region == "roi" and not config.places_visual_tokens:
            raise UserError(
                f"{method.name}:positions={selector} needs visual tokens that stand for places in "
                "the image; here the connector's learned queries read all of it"
            )
        if region == "image" and visual_tokens and part.needs > visual_tokens:
            raise UserError(
                f"{method.name}:positions={selector} asks for {part.needs} visual tokens; an image "
                f"has {visual_tokens} at {site}"
            )


def linear_sites(method: Method, config: ModelConfig, targets: str) -> dict[str, tuple[int, int]]:
    """Sites and (in, out) features of the linears that `targets` names.

    `all` stands for every linear of the decoder's blocks, `q;v` for some of them; `vision.q` is one
    of the vision encoder's blocks and `connector.0` the first of the connector; `vision.all` and
    `connector.all` are all of theirs.

    Raises:
      UserError: for a linear the model does not have.
    """
    towers = {"": {name: (f"llm.block.{name}", s) for name, s in config.llm.linears().items()}}
    if config.vision is not None and not config.vision.is_pair:
        linears = config.vision.linears().items()
        towers["vision."] = {name: (f"vision.block.{name}", s) for name, s in linears}
    if not getattr(method, "sees_tokens", False) and (linears := config.connector_linears()):
        towers["connector."] = {name: (f"connector.{name}", s) for name, s in linears.items()}
    chosen = {}
    for target in targets.split(";"):
        tower, dot, name = target.rpartition(".")
        linears = towers.get(tower + dot, {})
        if not linears or name not in ("all", *linears):
            allowed = (f"{t}{name}" for t, linears in towers.items() for name in ("all", *linears))
            raise choice_error(f"target of {method.name}", target, allowed)
        chosen |= dict(linears.values() if name == "all" else [linears[name]])
    return chosen


def check_rank(method: Method, rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Checks the rank of a product of factors that is added to every linear of some shapes.

    Ranks beyond the shorter side of a matrix are common where keys and values are narrow.

    Raises:
      UserError: where the rank is beyond the longer side of a matrix.
    """
    most = min(map(max, shapes.values()))
    if rank > most:
        raise UserError(
            f"{method.name}:rank must be at most {most}, the longer side of the smallest matrix "
            f"that it acts on, got {rank}"
        )


def is_per_image(site: str) -> bool:
    """Whether activations at a site have a row for each image, not one for each row of tokens."""
    return site.startswith("vision.") or site.removeprefix("connector.").isdigit()


def num_layers(site: str, config: ModelConfig) -> int:
    """Layers of the tower a layered site belongs to; 0 for a site outside the blocks."""
    if site.startswith("llm.block."):
        return config.llm.num_layers
    if site.startswith("vision.block."):
        return config.vision.used_layers
    return 0


def format_layers(layers: Collection[int], site: str, config: ModelConfig) -> str:
    """What `layers=` calls these layers of a site, which are in order."""
    every = [*layers] == [*range(num_layers(site, config) or 1)]
    return "all" if every else ";".join(map(str, layers))
