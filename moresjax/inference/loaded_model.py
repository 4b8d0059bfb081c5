"""A module with its tuning, its devices and what generates with it: the state of a `Model`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from moresjax._version import __version__
from moresjax.core.types import Numbers
from moresjax.data.processor import Processor
from moresjax.data.processor_facts import processor_facts
from moresjax.data.region_providers import RegionProvider
from moresjax.data.samples import IMAGE_MARK, Sample
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.inference.arguments import Adapters
from moresjax.inference.describe import describe_model
from moresjax.inference.prompts import PromptEncoder
from moresjax.inference.regions import attended_regions
from moresjax.inference.service import GenerationService
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.runs.processor import name_words, serving
from moresjax.sharding.mesh import shard_params
from moresjax.tuning.attach import Tuning
from moresjax.tuning.multi_adapter import Reserve, adapter_ids
from moresjax.weights.adapter import (
    add_tunings,
    attach_adapter,
    load_adapters,
    unload_adapter,
)
from moresjax.weights.fingerprint import (
    exact_fingerprint,
    fingerprint,
    precision,
    twin_fingerprint,
)


class LoadedModel:
    """What a `Model` is made of and how its tuning is changed.

    Reading costs nothing: no property ends an engine or copies weights. Whatever changes the tuning
    or the devices ends the engines, and the next generation compiles new ones.

    Args:
      mllm: The Flax module, which belongs to this object from now on.
      processor: Tokenizer, template and image processor; None when the folder had no tokenizer.
      mesh: The devices that the parameters are on; None for a single device.
      engine_config: The knobs of generation.
      image_token_id: The id that stands for a visual token in ids that `transformers` made;
        default: that of `<image>`, where the tokenizer has it.
    """

    def __init__(
        self,
        mllm: MLLM,
        processor: Processor | None,
        mesh: Mesh | None = None,
        engine_config: EngineConfig = DEFAULT_ENGINE_CONFIG,
        image_token_id: int | None = None,
    ) -> None:
        self._mllm = mllm
        if image_token_id is None and processor is not None and mllm.config.vision is not None:
            image_token_id = processor.tokenizer.get_vocab().get(IMAGE_MARK)
        self.image_token_id = image_token_id
        self.prompts = PromptEncoder(processor, self._attend)
        self.service = GenerationService(mllm, self.prompts, mesh, engine_config)
        self.fit_processor()

    def __repr__(self) -> str:
        return describe_model(self)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """The module as treescope shows it, with the description above; treescope calls this."""
        from treescope import repr_lib

        parts = {"description": str(self), "mllm": self.mllm, "processor": self.processor}
        return repr_lib.render_object_constructor(type(self), parts, path, subtree_renderer)

    def fit_processor(self) -> None:
        """Tells the attached tuning and the processor what they have to know of each other."""
        if self.processor is not None:
            tuning = self._mllm.tuning
            name_words(tuning, self.processor.tokenizer)
            serves = serving(self.processor, tuning.edit_selectors, self.config)
            self.prompts.saved_processor = serves

    def _attend(self, sample: Sample, provider: RegionProvider) -> Sample:
        """A prompt with the regions that the model attends to."""
        assert self.processor is not None  # it made the prompt
        return attended_regions(self._mllm, self.processor, sample, provider)

    @property
    def mllm(self) -> MLLM:
        """The Flax module.

        Its LLM's blocks are stacked until something is generated and a list afterwards, which is
        what decoding needs; see `restack`.
        """
        return self._mllm

    @property
    def processor(self) -> Processor | None:
        """Tokenizer, template and image processor; None when the folder had no tokenizer."""
        return self.prompts.saved_processor

    @property
    def config(self) -> MLLMConfig:
        """The architecture."""
        return self._mllm.config

    @property
    def tuning(self) -> str:
        """The spec string of the attached tuning."""
        return self._mllm.tuning.spec

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that `load_adapters` has loaded."""
        return self._mllm.tuning.adapters

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the parameters are on; None for a single device."""
        return self.service.mesh

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell models with different weights apart."""
        return fingerprint(self._mllm)

    @property
    def exact_fingerprint(self) -> str:
        """Digits that also tell neighbouring steps of a run and stored precisions apart."""
        return exact_fingerprint(self._mllm)

    @property
    def provenance(self) -> dict[str, str]:
        """What a result says of the model behind it.

        These are fingerprints (`model` and `weights` tell precisions apart, `twin` does not), the
        precision, tuning, processor and version.
        """
        return {
            "model": self.fingerprint,
            "weights": self.exact_fingerprint,
            "twin": twin_fingerprint(self._mllm),
            "precision": precision(self._mllm),
            "tuning": self.tuning,
            "processor": processor_facts(self.processor)["hash"],
            "version": __version__,
        }

    def adapter_names(self, adapters: Adapters, rows: int) -> Sequence[str | None] | None:
        """The adapter of every row, from one name for all rows or a list of names.

        Raises:
          UserError: for an unknown adapter, or another number of adapters than rows.
        """
        names = [adapters] * rows if isinstance(adapters, str) else adapters
        adapter_ids(self._mllm.tuning, names, rows)
        return names

    def restack(self) -> MLLM:
        """Ends generation and returns the Flax module with stacked blocks, as training has them.

        The compiled engines are dropped; the next `generate` makes new ones.

        >>> from moresjax.testing import talking_model
        >>> talking_model().restack().llm.blocks.mlp.up.kernel.shape
        (2, 16, 24)
        """
        self.service.reset()
        self._mllm.llm.restack()
        if self.mesh is not None:
            nnx.update(self._mllm, shard_params(nnx.state(self._mllm), self.mesh))
        return self._mllm

    def shard(self, mesh: Mesh) -> None:
        """Splits the parameters over the devices of a mesh, by the rules of training.

        Generation, scores and logits then run on all of these devices, with rows split over the
        mesh axes `data` and `fsdp`.

        >>> from moresjax.sharding.mesh import make_mesh
        >>> from moresjax.testing import talking_model
        >>> model = talking_model()
        >>> model.shard(make_mesh())
        >>> model.mesh.axis_names
        ('data', 'fsdp', 'tensor')
        """
        self.service.mesh = mesh
        self.restack()

    def attach(self, tuning: str, *, seed: int = 0) -> None:
        """Replaces the attached tuning by a freshly initialised one.

        >>> from moresjax.testing import talking_model
        >>> model = talking_model()
        >>> model.attach("mores:rank=2,positions=image")
        >>> model.tuning
        'mores:positions=image,rank=2'

        Args:
          tuning: The spec string; `none` removes the attached tuning.
          seed: Seeds the initial parameters.

        Raises:
          UserError: The spec is malformed or does not fit the model.
        """
        self._mllm.attach(tuning, seed=seed)
        self.service.reset()
        self.fit_processor()

    def set(self, method: str = "steer", **values: Numbers) -> None:
        """Sets what the attached tuning was given, such as a steering vector and its strength.

        Nothing is compiled again, and the engines stay.

        >>> import numpy as np
        >>> from moresjax.testing import talking_model
        >>> model = talking_model("steer:positions=generated")
        >>> model.set(vector=np.ones(16), alpha=2.0)

        Args:
          method: The method, by its name in the spec; a second `steer` is `steer_2`.
          values: Arrays by name: of `steer`, `vector` `[D]`, or `[L, D]` whose row l steers layer
            l, and `alpha`, a number or one for each layer.

        Raises:
          UserError: The tuning has no such method or value, or a value has another shape.
        """
        self._mllm.tuning.set_constants(method, values)
        self.service.update()

    def load_vectors(
        self,
        vectors: Mapping[str, Numbers],
        tuning: str = "steer:positions=last_prompt|generated",
    ) -> None:
        """Loads steering vectors, one of which every prompt chooses, beside adapters or others.

        `generate`, `score` and `logits` take their names as those of adapters. Adapters and vectors
        that are loaded already stay, as with `load_adapters`; a single tuning is replaced.

        >>> import numpy as np
        >>> from moresjax.testing import talking_model
        >>> model = talking_model()
        >>> model.load_vectors({"up": np.ones(16), "down": -np.ones(16)})
        >>> answers = model.generate(["two ?"] * 3, adapters=["up", None, "down"], max_new_tokens=2)
        >>> len(answers)
        3

        Args:
          vectors: Arrays `[D]`, or `[L, D]` whose row l steers layer l, by the names to choose them
            with.
          tuning: The spec of the method that adds them: its positions, site, layers and strength.

        Raises:
          UserError: The spec is no `steer`, or a vector has another shape.
        """
        tunings = {}
        for name, vector in vectors.items():
            tunings[name] = Tuning(tuning, self.config)
            tunings[name].initialize()
            tunings[name].set_constants("steer", {"vector": vector})
        self._hold(add_tunings, tunings)

    def load_adapter(
        self, folder: str | Path, *, edits: str = "", allow_pickle: bool = False
    ) -> None:
        """Replaces the attached tuning by an adapter folder of moresjax, `peft` or `pyreft`.

        >>> import tempfile
        >>> from moresjax.testing import talking_model
        >>> from moresjax.weights.adapter import save_adapter
        >>> folder = save_adapter(talking_model("lora:rank=2").mllm, tempfile.mkdtemp())
        >>> model = talking_model()
        >>> model.load_adapter(folder)
        >>> model.tuning
        'lora:rank=2'

        Args:
          folder: The adapter folder.
          edits: What a folder of pyreft does not say: its methods and their tokens, such as
            `mores:positions=image`; see `moresjax.weights.pyreft.import_pyreft`.
          allow_pickle: Whether the pickles of a pyreft folder may be read.

        Raises:
          UserError: The folder is none of these, or does not belong to this model.
        """
        attach_adapter(self.restack(), folder, edits=edits, allow_pickle=allow_pickle)
        self.fit_processor()

    def load_adapters(
        self,
        folders: Mapping[str, str | Path],
        *,
        reserve: Reserve = 0,
        edits: str = "",
        allow_pickle: bool = False,
    ) -> None:
        """Loads adapter folders of moresjax, `peft` or `pyreft`, one of which every prompt chooses.

        They may be of any methods, ranks, layers and linears, and have connectors of their own.
        Those that are loaded already stay, but for those of the same names; a single tuning is
        replaced. Within the room of what is loaded nothing is compiled again.

        >>> import tempfile
        >>> from moresjax.testing import talking_model
        >>> from moresjax.weights.adapter import save_adapter
        >>> lora = save_adapter(talking_model("lora:rank=2").mllm, tempfile.mkdtemp())
        >>> mores = save_adapter(talking_model("mores:rank=1").mllm, tempfile.mkdtemp())
        >>> model = talking_model()
        >>> model.load_adapters({"counts": lora, "compares": mores}, reserve=4)
        >>> answers = model.generate(["two ?"] * 2, adapters=["counts", None], max_new_tokens=2)
        >>> len(answers)
        2
        >>> model.unload_adapter("compares")
        >>> model.adapters
        ('counts',)

        Args:
          folders: Adapter folders by the names to choose them with.
          reserve: The room for adapters to come: how many there may be in all, of the methods and
            up to the ranks that are loaded now; or by spec how many adapters of it there may be,
            such as `{"lora:rank=16": 8, "connector": 8}`, of which `connector` are those with one
            of their own. Beyond the room the next answer compiles once more.
          edits: What folders of pyreft do not say; see `load_adapter`.
          allow_pickle: Whether the pickles of pyreft folders may be read.

        Raises:
          UserError: A folder is not an adapter of this model, it changes the LLM or the encoder
            itself, or one of its methods cannot be chosen per row; all is then as it was.
        """
        options = {"reserve": reserve, "edits": edits, "allow_pickle": allow_pickle}
        self._hold(load_adapters, folders, **options)

    def unload_adapter(self, name: str) -> None:
        """Drops one of the adapters that `load_adapters` has loaded; its room stays.

        Whoever decodes step by step ends its answers first: another adapter may get its number.

        Raises:
          UserError: There is no such adapter.
        """
        self._hold(unload_adapter, name)

    def _hold(self, change: Callable[..., None], *args: Any, **options: Any) -> None:
        """Changes which adapters are held; engines go on where their programs do."""
        several = bool(self._mllm.tuning.held)
        change(self._mllm, *args, **options)
        self.fit_processor()
        if self.mesh is not None:
            tuning = self._mllm.tuning
            nnx.update(tuning, shard_params(nnx.state(tuning), self.mesh))
        if not self.service.update() and several:
            logging.getLogger(__name__).warning(
                "the adapters do not fit the room that was compiled for; the next answer compiles "
                "once more (load_adapters(reserve=...) makes room beforehand)"
            )
