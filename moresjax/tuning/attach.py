"""The tuning attached to a model: its parameters, layer gates, and the hooks of a forward pass.

Axis legend: B rows, S tokens, P slots, D hidden size, L layers.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.core.layout import SHARED, Batch, TokenKind, TokenLayout
from moresjax.tuning.base import (
    Edit,
    Method,
    Probe,
    ProbeContext,
    Theta,
    VirtualTokens,
    WeightDelta,
)
from moresjax.tuning.hooks import Attached, Hooks
from moresjax.tuning.selectors import parse_layers, parse_selector
from moresjax.tuning.sites import check_selector, num_layers
from moresjax.tuning.spec import format_spec, parse_spec


class Gate(nnx.Variable):
    """Which layers a method acts on, `[L]`: data, so that one program serves every choice."""


class Shared(nnx.Variable):
    """A frozen array that all layers of a method use."""


class Constant(nnx.Variable):
    """What a method was given rather than has to learn: no parameter, so nothing trains it."""


class Tuning(nnx.Module):
    """What a spec string attaches to a model.

    Attributes:
      methods: key (the method's name, numbered when it occurs twice) and method, in spec order.
      theta: fp32 parameters, `theta[method][site][leaf]`, with a leading layer axis at layered
        sites; shapes only until `initialize`, except for constants.
      gates: `gates[method][site]`, one flag per layer.
      shared: `shared[method][leaf]`, frozen arrays of methods that have some.
      words: word and its token ids, for `token(WORD)` selectors; set by who has the tokenizer.
      adapters: names of several trained tunings held at once (see `tuning.multi_adapter`), from
        which `Batch.adapter` chooses; parameters and gates then have an adapter axis.

    Raises:
      UserError: when the spec does not fit the model.
    """

    def __init__(self, spec: str, config):
        self.config = config
        methods = [m.resolve(config) for m in parse_spec(spec) if m.name != "none"]
        self.methods: tuple[tuple[str, Method], ...] = _numbered(methods)
        self.words: tuple[tuple[str, tuple[int, ...]], ...] = ()
        self.adapters: tuple[str, ...] = ()
        self.theta, self.gates, self.shared = nnx.Dict(), nnx.Dict(), nnx.Dict()
        _check_conflicts(self.methods, config)
        for key, method in self.methods:
            sites = method.sites(config)
            if not sites:
                continue
            self.theta[key], self.gates[key] = nnx.Dict(), nnx.Dict()
            if isinstance(method, WeightDelta) and (shared := method.shared(config)):
                shared = {n: Shared(jnp.asarray(x)) for n, x in shared.items()}
                self.shared[key] = nnx.Dict(shared)
            for site in sites:
                if isinstance(method, Edit):
                    check_selector(method, site, config)
                if layers := num_layers(site, config):
                    chosen = parse_layers(method.layer_choice, layers)
                    self.gates[key][site] = Gate(jnp.asarray(chosen))
        self._set(jax.eval_shape(self._values, jax.random.key(0)), nnx.Param)
        self._set(self._values(jax.random.key(0), constant=True), Constant)

    def _values(self, key: PRNGKeyArray, constant: bool = False) -> dict[str, dict[str, Theta]]:
        """Initial parameters, or constants, by method and site."""
        values = {}
        for number, (name, method) in enumerate(self.methods):
            if method.constant != constant:
                continue
            for place, (site, shape) in enumerate(method.sites(self.config).items()):
                own = jax.random.fold_in(jax.random.fold_in(key, number), place)
                # A given vector takes no part in comparisons, so it must not be compiled in.
                start = _start.__wrapped__ if constant else _start
                theta = start(method, tuple(shape), num_layers(site, self.config), own)
                values.setdefault(name, {})[site] = theta
        return values

    def _set(self, values: dict[str, dict[str, dict]], kind: type[nnx.Variable]) -> None:
        for key, by_site in values.items():
            for site, theta in by_site.items():
                self.theta[key][site] = nnx.Dict({n: kind(x) for n, x in theta.items()})

    def initialize(self, seed: int = 0) -> None:
        """Gives every parameter its initial value."""
        if self.methods:
            self._set(self._values(jax.random.key(seed)), nnx.Param)

    @property
    def spec(self) -> str:
        """The spec string, in its shortest form."""
        return format_spec(method for _, method in self.methods)

    @property
    def trains(self) -> tuple[str, ...]:
        """Paths of what trains with these methods: their own parameters, and base parameters."""
        return ("tuning.theta", *(path for _, method in self.methods for path in method.trains))

    @property
    def selected_words(self) -> tuple[str, ...]:
        """The words of `token(WORD)` selectors."""
        edits = [method for _, method in self.methods if isinstance(method, Edit)]
        return tuple(word for m in edits for word in parse_selector(m.positions).words)

    def _slots(self, *sites: str) -> int:
        """How many slots there are at some sites."""
        slots = [(key, method) for key, method in self.methods if isinstance(method, VirtualTokens)]
        return sum(method.length for key, method in slots for s in sites if s in self.theta[key])

    @property
    def num_slots(self) -> int:
        """The number of extra tokens before the first token of the LLM."""
        return self._slots("llm.embed", "llm.block.in")

    @property
    def num_virtual_tokens(self) -> int:
        """P, the number of keys before the first token's: learned ones, and extra tokens'."""
        return self.num_slots + self._slots("llm.block.kv")

    def check_single(self, what: str) -> None:
        """Raises a `UserError` when several tunings are held, of which `what` can use one only."""
        if self.adapters:
            raise UserError(
                f"{what} takes a single tuning, the model holds {', '.join(self.adapters)}"
            )

    def subset(self, keep: Callable[[Method], bool]) -> "Tuning":
        """A copy with some of the methods."""
        part = nnx.clone(self)
        part.methods = tuple((key, method) for key, method in self.methods if keep(method))
        for key in set(part.theta) - {key for key, _ in part.methods}:
            del part.theta[key], part.gates[key]
            if key in part.shared:
                del part.shared[key]
        return part

    def common(self, key: str) -> Theta:
        """The shared arrays of a method."""
        return {n: x[...] for n, x in self.shared[key].items()} if key in self.shared else {}

    def for_decoding(self) -> "Tuning":
        """The part that can act on a generated token."""

        def acts(method: Method) -> bool:
            if isinstance(method, Edit):
                return parse_selector(method.positions).acts_while_decoding
            return isinstance(method, WeightDelta)

        return self.subset(acts)

    def hooks(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray | None = None,
        decoding: bool = False,
        probes: Sequence[Probe] = (),
        context: ProbeContext | None = None,
        part: Callable[[Array], Array] | None = None,
    ) -> Hooks:
        """The hooks of one forward pass over `batch`.

        While decoding, edits whose selector cannot meet a generated token are left out, so that the
        program is that of the bare model. `part` cuts from the masks of a whole batch what the LLM
        reads of it, which is not its beginning.
        """
        later = decoding or part is not None  # what slots have done is in the cache
        slots = {
            "vision": self._slots("vision.embed", "vision.block.in"),
            "llm": 0 if later else self.num_slots,
        }
        rows = self._rows(batch)
        masks = _Masks(batch, self.config, slots, dict(self.words), part)
        items = []
        for name, method in self.methods:
            if name not in self.theta:
                continue
            for site, variables in self.theta[name].items():
                theta = {n: x[...] for n, x in variables.items()}
                gate = self.gates[name][site][...] if site in self.gates[name] else None
                if isinstance(method, VirtualTokens):
                    if not later or site.startswith("vision."):
                        items.append((site, Attached(method, theta)))
                    continue
                if isinstance(method, WeightDelta):
                    theta = _prepare(method, gated(method, theta, gate), gate)
                    common = self.common(name)
                    if method.sees_tokens:
                        common["tokens"] = masks(site, parse_selector("all"))
                    items.append((site, Attached(method, theta, common=common, rows=rows(site))))
                    continue
                in_llm = site.startswith("llm.")
                if batch.pixels is None and not in_llm:
                    continue  # the vision encoder does not run
                selector = parse_selector(method.positions)
                if decoding and not (selector.acts_while_decoding and in_llm):
                    continue
                prepared = _prepare(method, theta, gate)
                mask = masks(site, selector)
                items.append((site, Attached(method, prepared, gate, mask, rows=rows(site))))
        return Hooks(items, key, probes, context)

    def _rows(self, batch: Batch) -> Callable[[str], Int[Array, "..."] | None]:
        """For a site, the adapter of every row of its activations."""
        if batch.adapter is not None and not self.adapters:
            raise UserError("the batch chooses adapters, but the model has a single tuning")
        chosen = -1 if batch.adapter is None else batch.adapter
        chosen = jnp.broadcast_to(jnp.asarray(chosen), batch.layout.shape[:1])

        def rows(site):
            if not self.adapters:
                return None
            if site.startswith("vision.") and batch.pixels is not None:
                # The encoder sees every image of a row as a row of its own.
                return jnp.repeat(chosen, batch.pixels.shape[1])
            return chosen

        return rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(method: Method, shape: tuple, layers: int, key: PRNGKeyArray) -> Theta:
    """Initial parameters at one site; compiled once for all sites and models of its kind."""
    if not layers:
        return method.initial(key, *shape)
    return jax.vmap(lambda key: method.initial(key, *shape))(jax.random.split(key, layers))


def _numbered(methods: Sequence[Method]) -> tuple[tuple[str, Method], ...]:
    seen, keyed = {}, []
    for method in methods:
        seen[method.name] = count = seen.get(method.name, 0) + 1
        keyed.append((method.name if count == 1 else f"{method.name}_{count}", method))
    return tuple(keyed)


def _check_conflicts(methods: Sequence[tuple[str, Method]], config) -> None:
    """Refuses two methods that both redefine one matrix."""
    training = [method for _, method in methods if method.trains]
    if len(training) > 1:
        names = " and ".join(method.name for method in training)
        raise UserError(f"{names} both train weights of the LLM itself; use one of them")
    full = next((method for method in training if "llm" in method.trains), None)
    first: dict[str, Method] = {}
    for method in (method for _, method in methods if isinstance(method, WeightDelta)):
        for site in method.sites(config):
            before = full if full and site.startswith("llm.") else first.get(site)
            if before and method.whole:
                raise UserError(
                    f"{method.name} redefines the whole matrix of {site} and cannot come after "
                    f"{before.name}"
                )
            first.setdefault(site, method)


def _prepare(method: Method, theta, gate):
    return _for_each(method.prepare, gate)(theta)


def _for_each(function: Callable, gate) -> Callable:
    """`function` of one layer's parameters, mapped over the axes that the gate has."""
    for _ in range(0 if gate is None else gate.ndim):
        function = jax.vmap(function)
    return function


def gated(method: WeightDelta, theta, gate):
    """Stacked parameters in which gated-off layers are neutral."""

    def choose(on, off):
        return jnp.where(gate.reshape(*gate.shape, *[1] * (on.ndim - gate.ndim)), on, off)

    return jax.tree.map(choose, theta, _for_each(method.neutral, gate)(theta))


def extend_layout(layout: TokenLayout, slots: int) -> TokenLayout:
    """The layout with `slots` places in front, seen by every document of the row."""
    if not slots:
        return layout

    def pad(field, value):
        return jnp.pad(jnp.asarray(field), ((0, 0), (slots, 0)), constant_values=value)

    ahead = jnp.broadcast_to(jnp.arange(slots), (layout.shape[0], slots))
    return layout.replace(
        kind=pad(layout.kind, int(TokenKind.SYSTEM)),
        image=pad(layout.image, -1),
        position=jnp.concatenate([ahead, jnp.asarray(layout.position) + slots], axis=1),
        document=pad(layout.document, SHARED),
        branch=pad(layout.branch, 0),
    )


class _Masks:
    """Masks of selected tokens at each tower, computed once per selector."""

    def __init__(
        self,
        batch: Batch,
        config,
        slots: dict[str, int],
        words: dict[str, tuple[int, ...]],
        part: Callable[[Array], Array] | None,
    ):
        self.batch, self.config, self.slots, self.words = batch, config, slots, words
        self.part = part or (lambda mask: mask)
        self.known = {}

    def __call__(self, site, selector):
        tower = site.split(".")[0]
        if (tower, selector.text) not in self.known:
            self.known[tower, selector.text] = self._mask(tower, selector)
        return self.known[tower, selector.text]

    def _mask(self, tower, selector):
        batch, slots = self.batch, self.slots
        if tower == "llm":
            slots = slots["llm"]
            tokens = jnp.pad(jnp.asarray(batch.tokens), ((0, 0), (slots, 0)), constant_values=-1)
            layout = extend_layout(batch.layout, slots)
            return self.part(selector(layout, tokens, batch.roi, self.words))
        rows, images = batch.pixels.shape[:2]
        vision = self.config.vision
        if tower == "connector":
            layout = _feature_layout(rows, images, self.config.visual_tokens, 0)
            return selector(layout, roi=batch.roi)
        layout = _feature_layout(rows * images, 1, vision.num_patches, vision.prefix_tokens)
        return selector(extend_layout(layout, slots["vision"]))


def _feature_layout(rows: int, images: int, visual_tokens: int, extra: int) -> TokenLayout:
    """Layout of visual features, `extra` tokens (class token, registers) before each row's."""
    image = jnp.arange(-extra, images * visual_tokens)
    image = jnp.broadcast_to(jnp.maximum(image, -1), (rows, image.size))
    zeros = jnp.zeros_like(image)
    kind = jnp.where(image >= 0, int(TokenKind.IMAGE), int(TokenKind.SYSTEM))
    return TokenLayout(kind, image, zeros, zeros, zeros, visual_tokens)
