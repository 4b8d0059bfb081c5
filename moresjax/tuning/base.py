"""The four kinds of tuning, as interfaces, and the registry of methods.

Axis legend: B batch, S tokens, D features in, F features out, P virtual tokens.

A method is a frozen dataclass whose fields are the keys of its spec string, in a file of its own in
`moresjax/tuning/methods`. `params` is a dict of fp32 arrays for *one* layer; the framework adds the
leading layer axis, scans it beside the frozen blocks and switches layers on and off (layer masks).
"""

import abc
import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.core.types import AnyArray, pytree_dataclass

Params = dict[str, Array]

METHODS: dict[str, type["Method"]] = {}


def register(cls: type["Method"]) -> type["Method"]:
    """Makes a method available to spec strings under its `name`."""
    METHODS[cls.name] = cls
    return cls


@dataclasses.dataclass(frozen=True)
class Method:
    """What every method has in common.

    Attributes:
      name: the method's name in spec strings.
      trains: paths of base parameters that train in full with this method, such as `llm`.
      constant: whether `params` is given rather than learned: never trained, counted or saved.
    """

    name: ClassVar[str]
    constant: ClassVar[bool] = False
    trains: ClassVar[tuple[str, ...]] = ()

    def sites(self, config) -> dict[str, Any]:
        """Sites the method acts on in a model of this `MLLMConfig`, each with the shape information
        that `initial` takes. Layered sites start with `llm.block.` or `vision.block.`."""
        return {}

    @property
    def layer_choice(self) -> str:
        return getattr(self, "layers", "all")

    def resolve(self, config) -> "Method":
        """The method in a model of this `MLLMConfig`: itself, or the one it is a variant of."""
        return self

    def parts(self) -> tuple["Method", ...]:
        """What a spec string with this method stands for: itself, or several other methods."""
        return (self,)

    def prepare(self, params: Params) -> Params:
        """Parameters as the forward pass uses them; called once per step, per layer."""
        return params


def layer_field():
    """The `layers` key. It takes no part in comparisons: which layers are on is data (layer masks),
    so methods that differ in nothing else share one compiled program."""
    return dataclasses.field(default="all", compare=False)


@dataclasses.dataclass(frozen=True)
class Edit(Method, abc.ABC):
    """Changes activations at a site: `h' = h + where(mask, delta(params, h), 0)`."""

    positions: str = "image"
    layers: str = layer_field()
    dropout: float = 0.0  # on the delta

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"{self.name}:dropout must be at least 0 and below 1, got {self.dropout}"
            )

    @abc.abstractmethod
    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        """Initial parameters of one layer for activations with `dim` features."""

    @abc.abstractmethod
    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What is added at selected tokens. `params` has been through `prepare`."""

    def drop(
        self, key: PRNGKeyArray, delta: Float[Array, "B S D"], h: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The delta after dropout (training only)."""
        return dropped(delta, self.dropout, key)


@runtime_checkable
class LinearLike(Protocol):
    """A linear, possibly already wrapped by other methods."""

    bias: Float[Array, "F"] | None

    def dense(self) -> Float[Array, "D F"]:
        """The weights, whatever they are stored as."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]: ...


@dataclasses.dataclass(frozen=True)
class WeightDelta(Method, abc.ABC):
    """Acts on a named linear: `apply(params, linear, x) -> y`, merged where the maths allows.

    Attributes:
      whole: it redefines the whole matrix or reads the linear's weights, so it comes first on a
        matrix and there is one at most.
      sees_tokens: `params["tokens"]` is the mask `[B, S]` of tokens that are not padding.
    """

    whole: ClassVar[bool] = False
    sees_tokens: ClassVar[bool] = False
    layers: str = layer_field()

    def shared(self, config) -> dict[str, AnyArray]:
        """Frozen arrays that all layers and sites find in their `params`; neither saved nor
        trained."""
        return {}

    @abc.abstractmethod
    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params: ...

    @abc.abstractmethod
    def neutral(self, params: Params) -> Params:
        """Parameters of the same shapes that leave the linear as it is, for layers that are
        switched off."""

    @abc.abstractmethod
    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        """The tuned linear. `params` has been through `prepare`; `key` is given in training, for
        dropout."""

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        """Kernel and bias of a plain linear with the same output."""
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
    """

    length: int = 10

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"{self.name}:length must be at least 1, got {self.length}")

    @abc.abstractmethod
    def initial(self, key: PRNGKeyArray, *shape: Any) -> Params:
        """Initial content, of one layer at a layered site."""


@pytree_dataclass
class ProbeContext:
    """What a probe may know about the tokens besides the tensors it reads.

    Attributes:
      kind: kind of every key, `[B, S]`.
      mask: which keys each chosen query sees, `[B, Q, S]`.
      queries: row index of each chosen query, `[B, Q]`; None when the pass has only chosen queries.
      softcap: of the attention logits; 0: none (static).
    """

    kind: Int[Array, "B S"]
    mask: Bool[Array, "B Q S"]
    queries: Int[Array, "B Q"] | None
    softcap: float = dataclasses.field(default=0.0, metadata={"static": True})


@runtime_checkable
class Probe(Protocol):
    """Read-only: returns reduced statistics of one layer, stacked over layers by the framework.

    Attributes:
      name: key of the statistics in the output.
      site: `attn` (tensors `q`, `k`) or `out` (tensor `h`) of the decoder's blocks.
    """

    name: str
    site: str

    def read(self, context: ProbeContext, **tensors: Array) -> Any: ...
