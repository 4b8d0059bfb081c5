"""The four kinds of tuning, as interfaces, and the registry of methods.

Axis legend: B batch, S tokens, D features in, F features out, P virtual tokens.

A method is a frozen dataclass whose fields are the keys of its spec string, in a file of its own in
`moresjax/tuning/methods`; a number is annotated with its range (`core.ranges`). Its functions take
`params`, a dict of fp32 arrays for *one* layer. The framework adds the leading layer axis, scans it
beside the frozen blocks, and switches layers on and off (layer masks).
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.core.ranges import Rate, Size, check_ranges
from moresjax.core.registry import add_entry
from moresjax.core.types import AnyArray

Params = dict[str, Array]
# Where a method acts: names of sites, each with what `initial` needs to know about its shape.
Sites = Mapping[str, tuple[Any, ...]]

METHODS: dict[str, type["Method"]] = {}
M = TypeVar("M", bound="Method")


def register(cls: type[M]) -> type[M]:
    """Makes a method available to spec strings under its `name`.

    Raises:
      UserError: The name belongs to another method.
    """
    add_entry(METHODS, "tuning method", cls.name, cls)
    return cls


@runtime_checkable
class BlocksConfig(Protocol):
    """What methods read from the configuration of an LLM (`models.decoder.DecoderConfig`)."""

    @property
    def hidden_size(self) -> int:
        """Features of a token."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def gated_mlp(self) -> bool:
        """Whether an MLP has the product of two linears inside."""
        ...

    @property
    def tie_embeddings(self) -> bool:
        """Whether the vocabulary head is the table of embeddings."""
        ...

    @property
    def int8(self) -> bool:
        """Whether the blocks' weights are stored in eight bits."""
        ...

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear of a block."""
        ...

    def norms(self) -> tuple[str, ...]:
        """The names of the norms of a block and of those around the blocks."""
        ...


@runtime_checkable
class ModelConfig(Protocol):
    """What methods read from the configuration of a model (`models.mllm.MLLMConfig`)."""

    @property
    def llm(self) -> BlocksConfig:
        """The LLM."""
        ...

    @property
    def vision(self) -> Any:
        """One vision encoder, two of them (`is_pair`, in which no method acts), or None."""
        ...

    @property
    def visual_tokens(self) -> int:
        """Visual tokens per image."""
        ...

    @property
    def places_visual_tokens(self) -> bool:
        """Whether visual tokens stand for places in the image."""
        ...

    def feature_tokens(self) -> Int[np.ndarray, " F"] | None:
        """The visual token that each visual feature becomes; None where queries read them all."""
        ...

    def connector_linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear of a connector that is a chain of linears."""
        ...


@dataclasses.dataclass(frozen=True)
class Method:
    """What every method has in common.

    Attributes:
      name: the method's name in spec strings.
      trains: paths of base parameters that train in full with this method, such as `llm`.
      width: the field that is larger in a method with more room. Zeros in the parameters that are
        added leave it the function that it was, and get a gradient of exactly zero. Empty: none.
      constant: whether `params` are given rather than learned: never trained, counted or saved.
      by_rows: parameters whose rows are units, such as directions or learned tokens; of others the
        columns are, as in the kernel of a linear.
    """

    name: ClassVar[str]
    by_rows: ClassVar[tuple[str, ...]] = ()
    constant: ClassVar[bool] = False
    trains: ClassVar[tuple[str, ...]] = ()
    width: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_ranges(self, f"{self.name}:")

    def sites(self, config: ModelConfig) -> Sites:
        """The sites that the method acts on, each with the arguments that `initial` takes there.

        The names of layered sites start with `llm.block.` or `vision.block.`.
        """
        return {}

    def initial(self, key: PRNGKeyArray, *shape: Any) -> Params:
        """Initial parameters at a site; those of one layer where the site is layered."""
        raise NotImplementedError(f"{self.name} has no parameters of its own")

    def initial_layers(self, key: PRNGKeyArray, layers: int, *shape: Any) -> Params:
        """Initial parameters of all layers of a layered site, with a leading layer axis."""
        return jax.vmap(lambda key: self.initial(key, *shape))(jax.random.split(key, layers))

    @property
    def layer_choice(self) -> str:
        """The layers to act on, as `parse_layers` takes them."""
        return getattr(self, "layers", "all")

    def resolve(self, config: ModelConfig) -> "Method":
        """The method that acts in this model: itself, or the one that it is a variant of."""
        return self

    def widened(self, width: int) -> "Method":
        """The same with another `width`, for methods that have one."""
        changes: dict[str, Any] = {self.width: width}
        return dataclasses.replace(self, **changes)

    def parts(self) -> tuple["Method", ...]:
        """What a spec string with this method stands for: itself, or several other methods."""
        return (self,)

    def prepare(self, params: Params) -> Params:
        """Parameters as the forward pass uses them; called once per step, per layer."""
        return params

    def kind(self) -> "Method":
        """The method without what adapters that rows of a batch choose from may differ in.

        Width, layers, linears and what only decides how it starts and trains are data there.
        """
        free = {"layers": "all", "targets": "all"}
        own: dict[str, Any] = {
            f.name: free[f.name] for f in dataclasses.fields(self) if f.name in free
        }
        narrow = dataclasses.replace(self.trained, **own)
        return narrow.widened(1) if self.width else narrow

    def of_kind(self, params: dict[str, AnyArray]) -> dict[str, AnyArray]:
        """Parameters that do in `kind` what these do here; neither have been through `prepare`."""
        return params

    @property
    def trained(self) -> "Method":
        """The same without what only decides how it starts and trains: `init` and `dropout`."""
        own = {f.name: f.default for f in dataclasses.fields(self) if f.name in _TRAINING_FIELDS}
        return dataclasses.replace(self, **own)


_TRAINING_FIELDS = ("init", "dropout")


def layer_field() -> Any:
    """The `layers` key of a method.

    It takes no part in comparisons: which layers are on is data (layer masks), so methods that
    differ in nothing else share one compiled program.
    """
    return dataclasses.field(default="all", compare=False)


@dataclasses.dataclass(frozen=True)
class Edit(Method, abc.ABC):
    """Changes activations at a site: `h' = h + where(mask, delta(params, h), 0)`.

    Attributes:
      positions: the selector of the tokens that are changed.
      layers: the layers that it acts in.
      dropout: the rate of dropout on the delta, in training.
    """

    positions: str = "image"
    layers: str = layer_field()
    dropout: Rate = 0.0

    @abc.abstractmethod
    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        """Initial parameters of one layer for activations with `dim` features."""

    @abc.abstractmethod
    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What is added at selected tokens; `params` have been through `prepare`."""

    def drop(
        self, key: PRNGKeyArray, delta: Float[Array, "B S D"], h: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The delta after dropout (training only)."""
        return dropped(delta, self.dropout, key)


@runtime_checkable
class LinearLike(Protocol):
    """A linear, possibly already wrapped by other methods."""

    @property
    def bias(self) -> nnx.Variable | None:
        """The bias `[F]`."""
        ...

    def dense(self) -> Float[Array, "D F"]:
        """The weights, whatever they are stored as."""
        ...

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """The output of the linear."""
        ...


@dataclasses.dataclass(frozen=True)
class WeightDelta(Method, abc.ABC):
    """Acts on a named linear: `apply(params, linear, x) -> y`, merged where the maths allows.

    Attributes:
      whole: it redefines the whole matrix or reads the linear's weights, so it comes first on a
        matrix and there is one at most.
      sees_tokens: `params["tokens"]` is the mask `[B, S]` of tokens that are not padding.
      layers: the layers that it acts in.
    """

    whole: ClassVar[bool] = False
    sees_tokens: ClassVar[bool] = False
    layers: str = layer_field()

    def shared(self, config: ModelConfig) -> dict[str, AnyArray]:
        """Frozen arrays that all layers and sites find in their `params`.

        They are neither saved nor trained.
        """
        return {}

    @abc.abstractmethod
    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params:
        """Initial parameters of one layer's linear."""

    @abc.abstractmethod
    def neutral(self, params: Params) -> Params:
        """Parameters of the same shapes that leave the linear as it is.

        Layers that are switched off have them.
        """

    @abc.abstractmethod
    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        """The output of the tuned linear.

        Args:
          params: The parameters after `prepare`, and the shared arrays.
          linear: The linear that is tuned.
          x: Its input.
          key: Is given in training, for dropout.
        """

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        """Kernel and bias of a plain linear with the same output.

        Raises:
          UserError: where the method is no change of the weights.
        """
        raise UserError(f"{self.name} cannot be merged into the weights")


def dropped(x: Float[Array, "*B D"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*B D"]:
    """`x` after dropout; unchanged without a key."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class VirtualTokens(Method, abc.ABC):
    """`length` places before all tokens, with learned content, that every document sees.

    A site says what the places are, and which parameters it needs:

      `llm.embed`, `vision.embed`: extra tokens; `embedding` [P, D] is the first block's input.
      `llm.block.in`, `vision.block.in`: extra tokens; every block's input is its own `embedding`
        [P, D], whatever the block before has made of them.
      `llm.block.kv`: no tokens, but keys and values; `k` and `v` [P, F] in every block, the keys as
        they are after rotation.

    They take the first positions of the LLM: keys and values first, then tokens. What they do to a
    prompt is in the cache of its keys and values, so decoding is that of the bare model.

    Attributes:
      length: P.
    """

    by_rows: ClassVar[tuple[str, ...]] = ("embedding", "k", "v")
    length: Size = 10

    def kind(self) -> "Method":
        """The method with one token."""
        return dataclasses.replace(super().kind(), length=1)

    @abc.abstractmethod
    def initial(self, key: PRNGKeyArray, *shape: Any) -> Params:
        """Initial content; that of one layer where the site is layered."""
