"""The tuning attached to a model: its parameters, layer masks, and the hooks of a forward pass.

Axis legend: B rows, S tokens, P virtual tokens, D hidden size, L layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from moresjax.core.errors import UserError, choice_error
from moresjax.core.layout import Batch
from moresjax.core.types import Numbers
from moresjax.tuning.base import Edit, Method, ModelConfig, Params, VirtualTokens, WeightDelta
from moresjax.tuning.hooks import (
    Attached,
    AttachedDelta,
    AttachedEdit,
    AttachedTokens,
    AttachedWrite,
    Hooks,
)
from moresjax.tuning.layered import (
    initial_params,
    initial_params_jitted,
    mask_layers,
    prepare_layers,
)
from moresjax.tuning.masks import SiteMasks
from moresjax.tuning.probes import Probe, ProbeContext
from moresjax.tuning.selectors import Selector, mark_names, parse_layers, parse_selector
from moresjax.tuning.sites import check_selector, is_per_image, num_layers
from moresjax.tuning.spec import format_spec, parse_spec
from moresjax.tuning.variables import Constant, Held, LayerMask, Shared

Values = dict[str, dict[str, Params]]
# Where virtual tokens of the LLM pass through its blocks.
TOKENS = ("llm.embed", "llm.block.in")
# The key of own connectors among `Tuning.places`.
CONNECTOR = "connector"


def edit_selectors(methods: Iterable[Method]) -> list[Selector]:
    """The selectors of all edits among some methods.

    >>> import moresjax.tuning
    >>> [str(selector) for selector in edit_selectors(parse_spec("lora/mores:positions=roi"))]
    ['roi']
    """
    return [parse_selector(method.positions) for method in methods if isinstance(method, Edit)]


class Tuning(nnx.Module):
    """What a spec string attaches to a model.

    Attributes:
      config: the model's configuration.
      methods: key (the method's name, numbered when it occurs twice) and method, in spec order.
      params: fp32 parameters, `params[method][site][leaf]`, with a leading layer axis at layered
        sites; shapes only until `initialize`, except for constants.
      layer_masks: `layer_masks[method][site]`, one flag per layer.
      shared: `shared[method][leaf]`, frozen arrays of methods that have some.
      words: word and its token ids, for `token(WORD)` selectors; set by who has the tokenizer.
      held: the trained tunings that are held at once (see `tuning.multi_adapter`), from which
        `Batch.adapter` chooses; None for a single tuning. With several, `params` are prepared, they
        and `layer_masks` have an axis of places, and there are:
      places: `places[method]`, the place of every adapter.
      lengths: `lengths[method]`, of virtual tokens.
      connector: own connectors, `[C, ...]` by the name of the parameter in the connector.

    Raises:
      UserError: when the spec does not fit the model.
    """

    def __init__(self, spec: str, config: ModelConfig) -> None:
        self.config = config
        methods = [m.resolve(config) for m in parse_spec(spec) if m.name != "none"]
        self.methods: tuple[tuple[str, Method], ...] = numbered(methods)
        self.words: tuple[tuple[str, tuple[int, ...]], ...] = ()
        self.held: Held | None = None
        self.places, self.lengths, self.connector = nnx.Dict(), nnx.Dict(), nnx.Dict()
        self.params, self.layer_masks, self.shared = nnx.Dict(), nnx.Dict(), nnx.Dict()
        _check_conflicts(self.methods, config)
        for key, method in self.methods:
            sites = method.sites(config)
            if not sites:
                continue
            self.params[key], self.layer_masks[key] = nnx.Dict(), nnx.Dict()
            if isinstance(method, WeightDelta) and (shared := method.shared(config)):
                self.shared[key] = nnx.Dict({n: Shared(jnp.asarray(x)) for n, x in shared.items()})
            for site in sites:
                if isinstance(method, Edit):
                    check_selector(method, site, config)
                if layers := num_layers(site, config):
                    chosen = parse_layers(method.layer_choice, layers)
                    self.layer_masks[key][site] = LayerMask(jnp.asarray(chosen))
        self.set_values(jax.eval_shape(self.initial_values, jax.random.key(0)), nnx.Param)
        self.set_values(self.initial_values(jax.random.key(0), constant=True), Constant)

    def initial_values(self, key: PRNGKeyArray, constant: bool = False) -> Values:
        """Initial parameters, or constants, by method and site."""
        values: Values = {}
        for number, (name, method) in enumerate(self.methods):
            if method.constant != constant:
                continue
            for place, (site, shape) in enumerate(method.sites(self.config).items()):
                own = jax.random.fold_in(jax.random.fold_in(key, number), place)
                # A given vector takes no part in comparisons, so it must not be compiled in.
                start = initial_params if constant else initial_params_jitted
                layers = num_layers(site, self.config)
                values.setdefault(name, {})[site] = start(method, tuple(shape), layers, own)
        return values

    def set_values(
        self, values: dict[str, dict[str, dict[str, Any]]], kind: type[nnx.Variable]
    ) -> None:
        """Puts parameters, constants or their shapes in place."""
        for key, site, params in ((k, s, p) for k, own in values.items() for s, p in own.items()):
            self.params[key][site] = nnx.Dict({n: kind(x) for n, x in params.items()})

    def initialize(self, seed: int = 0) -> None:
        """Gives every parameter its initial value."""
        self.set_values(self.initial_values(jax.random.key(seed)), nnx.Param)

    def set_constants(self, method: str, values: Mapping[str, Numbers]) -> None:
        """Sets what a method was given, at all its sites.

        Args:
          method: The key of the method.
          values: Arrays by name, which are broadcast to all layers.

        Raises:
          UserError: Several adapters are held, the method or the value does not exist, or the value
            has another shape or is not finite.
        """
        self.check_single("setting a vector")
        if method not in [key for key, own in self.methods if own.constant]:
            raise UserError(f"tuning {self.spec!r} has no {method!r} whose values can be set")
        changes = []
        for name, value in values.items():
            value = np.asarray(value, np.float32)
            for site, params in self.params[method].items():
                if name not in params:
                    raise choice_error(f"value of {method}", name, [*params])
                shape = params[name].shape
                shapes = [shape, shape[1:]] if num_layers(site, self.config) else [shape]
                if value.shape not in shapes or not np.isfinite(value).all():
                    raise UserError(
                        f"{name} of {method} must be finite numbers of shape "
                        f"{' or '.join(map(str, shapes))}, got shape {value.shape}"
                    )
                changes.append((params[name], np.broadcast_to(value, shape)))
        for variable, value in changes:
            variable.set_value(jnp.asarray(value))

    @property
    def spec(self) -> str:
        """The spec string, in its shortest form."""
        return format_spec(method for _, method in self.methods)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are held at once; none for a single tuning."""
        return tuple(self.held.numbers) if self.held else ()

    @property
    def trains(self) -> tuple[str, ...]:
        """Paths of what trains with these methods: their own parameters, and base parameters."""
        return ("tuning.params", *(path for _, method in self.methods for path in method.trains))

    @property
    def selected_words(self) -> tuple[str, ...]:
        """The words of `token(WORD)` selectors."""
        return tuple(word for selector in self.edit_selectors for word in selector.words)

    @property
    def marks(self) -> tuple[str, ...]:
        """What `mark(NAME)` and `word(N)` selectors name, in the order of `Batch.marks`' bits."""
        return mark_names(self.edit_selectors)

    @property
    def edit_selectors(self) -> list[Selector]:
        """The selectors of all edits, at whatever sites."""
        return edit_selectors(method for _, method in self.methods)

    @property
    def selectors(self) -> dict[str, Selector]:
        """What each edit inside the LLM changes, by its key."""
        return {
            key: parse_selector(method.positions)
            for key, method in self.methods
            if isinstance(method, Edit)
            and any(site.startswith("llm.") for site in self.params.get(key, {}))
        }

    def _count_virtual_tokens(self, *sites: str) -> int:
        """How many virtual tokens there are at some sites."""
        return sum(
            method.length
            for key, method in self.methods
            for site in sites
            if isinstance(method, VirtualTokens) and site in self.params[key]
        )

    @property
    def num_extra_tokens(self) -> int:
        """The virtual tokens of the LLM that pass through its blocks, before the first token."""
        return self._count_virtual_tokens(*TOKENS)

    @property
    def num_virtual_tokens(self) -> int:
        """P, the number of keys before the first token's: learned ones, and extra tokens'."""
        return self.num_extra_tokens + self._count_virtual_tokens("llm.block.kv")

    def check_single(self, what: str) -> None:
        """Raises a `UserError` when several tunings are held, of which `what` can use one only."""
        if self.held:
            raise UserError(
                f"{what} takes a single tuning, the model holds "
                f"{', '.join(self.adapters) or 'room for several'}"
            )

    def subset(self, keep: Callable[[Method], bool]) -> "Tuning":
        """A copy with some of the methods."""
        part = nnx.clone(self)
        part.methods = tuple((key, method) for key, method in self.methods if keep(method))
        for key in set(part.params) - {key for key, _ in part.methods}:
            for own in (part.params, part.layer_masks, part.shared, part.places, part.lengths):
                if key in own:
                    del own[key]
        return part

    def common(self, key: str) -> Params:
        """The shared arrays of a method."""
        return {n: x[...] for n, x in self.shared[key].items()} if key in self.shared else {}

    def layer_mask(self, key: str, site: str) -> Array | None:
        """The layer mask of a method at a site; None outside the blocks."""
        masks = self.layer_masks[key]
        return masks[site][...] if site in masks else None

    def for_decoding(self) -> "Tuning":
        """The part that can act on a generated token."""

        def acts(method: Method) -> bool:
            if isinstance(method, Edit):
                return parse_selector(method.positions).acts_while_decoding
            return isinstance(method, WeightDelta)

        part = self.subset(acts)
        part.connector = nnx.Dict()
        if CONNECTOR in part.places:
            del part.places[CONNECTOR]
        return part

    def virtual_table(self) -> Bool[Array, "A P"] | None:
        """Which virtual tokens of the LLM each adapter, and last the base model, has.

        None where all rows have all of them.
        """
        if not self.held or not self.num_virtual_tokens:
            return None
        before = ("llm.block.kv",), TOKENS
        columns = [
            jnp.arange(method.length) < self.lengths[key][...][self.places[key][...]][:, None]
            for sites in before
            for key, method in self.methods
            if isinstance(method, VirtualTokens) and set(sites) & set(self.params[key])
        ]
        return jnp.concatenate(columns, axis=1)

    def hooks(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray | None = None,
        decoding: bool = False,
        probes: Sequence[Probe] = (),
        context: ProbeContext | None = None,
        cut: Callable[[Array], Array] | None = None,
        unfinished: bool = False,
        writes: Sequence[tuple[str, AttachedWrite]] = (),
    ) -> Hooks:
        """The hooks of one forward pass over a batch.

        Args:
          batch: The tokens and images of the pass.
          key: Is given in training, for dropout.
          decoding: Leaves out the edits whose selector cannot meet a generated token, so that the
            program is that of the bare model.
          probes: The statistics to read.
          context: What the probes may know about the tokens.
          cut: Cuts out of masks of the whole batch what the LLM reads of it, where that is not the
            beginning of the batch.
          unfinished: Whether the rows are prefixes of prompts, of which more follows.
          writes: What replaces activations, with its sites.
        """
        # What virtual tokens do to the beginning of a row is in the caches of what comes later.
        later = decoding or cut is not None
        num_extra = {
            "vision": self._count_virtual_tokens("vision.embed", "vision.block.in"),
            "llm": 0 if later else self.num_extra_tokens,
        }
        rows, table = self._rows(batch), None if later else self.virtual_table()
        present = None if table is None else table[adapter_numbers(batch)]
        masks = SiteMasks(
            batch,
            self.config,
            num_extra,
            present,
            dict(self.words),
            self.marks,
            cut,
            unfinished=unfinished,
            decoding=decoding,
        )

        def attached(name: str, method: Method, site: str) -> Attached | None:
            """A method as it acts at a site in this pass; None where it does not."""
            params = {n: x[...] for n, x in self.params[name][site].items()}
            layer_mask = self.layer_mask(name, site)
            if isinstance(method, VirtualTokens):
                acts = not later or site.startswith("vision.")
                return AttachedTokens(method, params, rows(name, site)) if acts else None
            if isinstance(method, WeightDelta):
                if layer_mask is not None and not self.held:
                    params = mask_layers(method, params, layer_mask)
                params = self._prepare(method, params, layer_mask)
                common = self.common(name)
                if method.sees_tokens:
                    common["tokens"] = masks(site, parse_selector("all"))
                return AttachedDelta(method, params, common, rows(name, site))
            assert isinstance(method, Edit)
            in_llm = site.startswith("llm.")
            if batch.pixels is None and not in_llm:
                return None  # the vision encoder does not run
            selector = parse_selector(method.positions)
            if decoding and not (selector.acts_while_decoding and in_llm):
                return None
            params, own = self._prepare(method, params, layer_mask), rows(name, site)
            return AttachedEdit(method, params, masks(site, selector), layer_mask, own)

        items = [
            (site, item)
            for name, method, site in self._sites()
            if (item := attached(name, method, site)) is not None
        ]
        return Hooks([*items, *writes], key, probes, context)

    def _sites(self) -> Iterator[tuple[str, Method, str]]:
        """Key, method and site of everything that is attached."""
        for name, method in self.methods:
            for site in self.params.get(name, {}):
                yield name, method, site

    def _prepare(self, method: Method, params: Params, layer_mask: Array | None) -> Params:
        """Parameters as the pass uses them; those of several adapters have been prepared."""
        return params if self.held else prepare_layers(method, params, layer_mask)

    def own_connectors(self, batch: Batch) -> tuple[Params, Int[Array, " I"]] | None:
        """The connectors of the adapters, and every image's place among them; None without any.

        Parameters are by their names in the connector.
        """
        if not self.connector:
            return None
        places = self._rows(batch)(CONNECTOR, "connector.0")
        assert places is not None  # there are several adapters
        return {name: x[...] for name, x in self.connector.items()}, places

    def _rows(self, batch: Batch) -> Callable[[str, str], Int[Array, "..."] | None]:
        """For a method and a site, the place of what acts on every row of the activations."""
        if batch.adapter is not None and not self.held:
            raise UserError("the batch chooses adapters, but the model has a single tuning")
        chosen = adapter_numbers(batch)

        def rows(key: str, site: str) -> Int[Array, "..."] | None:
            if not self.held:
                return None
            places = self.places[key][...][chosen]
            if is_per_image(site) and batch.pixels is not None:
                # The encoder sees every image of a row as a row of its own.
                return jnp.repeat(places, batch.pixels.shape[1])
            return places

        return rows


def adapter_numbers(batch: Batch) -> Int[Array, " B"]:
    """The number of every row's adapter; -1: the base model."""
    chosen = -1 if batch.adapter is None else batch.adapter
    return jnp.broadcast_to(jnp.asarray(chosen), batch.layout.shape[:1])


def numbered(methods: Sequence[Method]) -> tuple[tuple[str, Method], ...]:
    """Methods by name; the second of a name is `NAME_2`, and so on."""
    seen: dict[str, int] = {}
    keyed = []
    for method in methods:
        seen[method.name] = count = seen.get(method.name, 0) + 1
        keyed.append((method.name if count == 1 else f"{method.name}_{count}", method))
    return tuple(keyed)


def _check_conflicts(methods: Sequence[tuple[str, Method]], config: ModelConfig) -> None:
    """Refuses two methods that both redefine one matrix."""
    training = [method for _, method in methods if method.trains]
    full = next((method for method in training if "llm" in method.trains), None)
    if full and len(training) > 1:
        names = " and ".join(method.name for method in training)
        raise UserError(f"{names} both train weights of the LLM itself; use one of them")
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
