"""Loads the model of this folder into `transformers`, with the edits that were trained on it.

    from load_edits import load

    model = load()                      # or load(FOLDER, dtype=..., device_map=...)
    model.generate(**inputs)            # inputs of the folder's processor

The weights are an ordinary folder of `transformers`. What was trained beside them are edits: they
change activations at selected tokens, so no weights can hold them, and `from_pretrained` alone
gives the model without them. They are in the folder `edits` and act through
forward hooks: on the tokens of a prompt in the first pass over it and, where their selector
says so, on generated tokens.

A prompt is one question: earlier answers of a conversation count as its text. Inputs are
`input_ids` with an `attention_mask`; a cache is the one that `generate` fills by itself, and it is
of the default kind (with `use_cache=False` its answers are read as more prompt). Dropout is
training's. Needs torch, safetensors and transformers 5.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

Record = Mapping[str, Any]
# What a token is for.
PAD, SYSTEM, IMAGE, QUESTION, ANSWER = range(5)
REGIONS = {
    "image": (IMAGE,),
    "system": (SYSTEM,),
    "question": (QUESTION,),
    "prompt": (SYSTEM, IMAGE, QUESTION),
    "answer": (ANSWER,),
    "dialogue": (QUESTION, ANSWER),
    "generated": (ANSWER,),
    "all": (SYSTEM, IMAGE, QUESTION, ANSWER),
}


def load(folder: str | Path = Path(__file__).parent, **options: Any) -> nn.Module:
    """The model with its edits.

    Args:
      folder: The folder; default: the one that this file lies in.
      options: Are handed to `from_pretrained`.
    """
    architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, **options).eval()
    attach(model, folder)
    return model


def attach(model: nn.Module, folder: str | Path = Path(__file__).parent) -> Callable[[], None]:
    """Attaches the edits to a model that is loaded already.

    Args:
      model: What `from_pretrained` gave.
      folder: The folder; default: the one that this file lies in.

    Returns:
      A function that takes the edits off again.
    """
    description = json.loads((Path(folder) / "edits" / "edits.json").read_text())
    tensors = load_file(Path(folder) / "edits" / "edits.safetensors")
    prompt = _Prompt(description)
    names = [*inspect.signature(model.forward).parameters]

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        prompt.read(dict(zip(names, args, strict=False)) | kwargs)

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    hooks: dict[tuple[str, bool], list[_Edit]] = {}
    for number, record in enumerate(description["edits"]):
        for place, path in enumerate(record["modules"]):
            prefix = f"{number}."
            own = {
                n.removeprefix(prefix): x[place] for n, x in tensors.items() if n.startswith(prefix)
            }
            hooks.setdefault((path, record["before"]), []).append(_Edit(record, own, prompt))
    for (path, first), edits in hooks.items():
        module = model.get_submodule(path)
        if first:
            handles.append(module.register_forward_pre_hook(_change_input(edits), with_kwargs=True))
        else:
            # Before all others, so that recorded hidden states are the edited ones.
            handles.append(module.register_forward_hook(_change_output(edits), prepend=True))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


def _change_output(edits: list["_Edit"]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        for edit in edits:
            h = edit(h)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return hook


def _change_input(edits: list["_Edit"]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        h = args[0] if args else kwargs["hidden_states"]
        for edit in edits:
            h = edit(h)
        return ((h, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": h})

    return hook


class _Prompt:
    """What every token of the present pass is.

    Attributes:
      tokens: The ids, `[rows, tokens]`.
      kind: What each token is for; None before the first pass.
      decoding: Whether these are generated tokens, after what the cache holds.
    """

    def __init__(self, description: Record) -> None:
        self.image_token: int | None = description["image_token_id"]
        self.visual_tokens: int = description["visual_tokens"]
        self.vision_prefix: int = description["vision_prefix"]
        self.system: list[int] = description["system_ids"]
        self.tokens = torch.zeros(0)
        self.kind: Tensor | None = None
        self.decoding = False

    def read(self, inputs: Record) -> None:
        """Reads the arguments of the model's `forward`."""
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("the edits need input_ids: which tokens they change is read from them")
        cache = inputs.get("cache", inputs.get("past_key_values"))
        self.decoding = cache is not None and int(cache.get_seq_length()) > 0
        self.tokens = ids
        if self.decoding:
            if ids.shape[1] > 1:
                raise ValueError(
                    "the edits need a prompt to be read in one pass, with an empty cache"
                )
            self.kind = torch.full_like(ids, ANSWER)
            return
        mask = inputs.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", 0) != 2:
            raise ValueError("the edits need an attention_mask of rows and tokens")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device) > 0
        self.kind = torch.where(valid, QUESTION, PAD)
        # The text before a user's first word; its last token may be joined with that word.
        for row, kinds in zip(ids, self.kind, strict=True):
            where = kinds.nonzero()[: len(self.system), 0]
            own = torch.tensor(self.system[: len(where)], device=ids.device)
            equal = int((row[where] == own).cumprod(0).sum())
            if equal and equal >= len(self.system) - 1:
                kinds[where[:equal]] = SYSTEM
        if self.image_token is not None:
            self.kind[(ids == self.image_token) & valid] = IMAGE

    def mask(self, record: Record, h: Tensor) -> Tensor:
        """The tokens of `h` that an edit changes."""
        if record["tower"] == "llm":
            if self.kind is None:
                raise ValueError("the edits act in a pass through the whole model")
            kind, tokens, visual = self.kind, self.tokens, self.visual_tokens
        else:
            # Each image is a row: tokens before the patches, then these.
            prefix = self.vision_prefix if record["tower"] == "vision" else 0
            kind = torch.full(h.shape[:2], IMAGE)
            kind[:, :prefix] = SYSTEM
            tokens, visual = torch.zeros_like(kind), h.shape[1] - prefix
        chosen = torch.zeros_like(kind, dtype=torch.bool)
        for part in record["positions"]:
            chosen |= _region(part, kind, tokens, visual)
        return (chosen & (kind != PAD)).to(h.device).reshape(h.shape[:-1])


def _region(part: Record, kind: Tensor, tokens: Tensor, visual_tokens: int) -> Tensor:
    """The tokens that one part of a selector means."""
    if part["region"] == "token":
        return torch.isin(tokens, torch.tensor(part["ids"], device=tokens.device))
    if part["region"] == "last_prompt":
        text = (kind != PAD) & (kind != ANSWER)
        after = torch.nn.functional.pad(kind[:, 1:], (0, 1), value=PAD)
        return text & ((after == PAD) | (after == ANSWER))
    inside = torch.isin(kind, torch.tensor(REGIONS[part["region"]], device=kind.device))
    count = inside.long()
    rank = count.cumsum(1) - 1
    total = count.sum(1, keepdim=True).expand_as(rank)
    if part["region"] == "image":
        # Within each image.
        rank, total = rank % max(visual_tokens, 1), torch.full_like(rank, visual_tokens)
    return inside & _slice(part["slice"], rank, total)


def _slice(part: Record, rank: Tensor, n: Tensor) -> Tensor:
    """Whether a token is meant, from its rank in its run and the length n of the run."""
    before, after = part.get("skipped", (0, 0))
    rank, n = rank - before, (n - before - after).clamp(min=0)
    return (rank >= 0) & (rank < n) & _chosen(part, rank, n)


def _chosen(part: Record, rank: Tensor, n: Tensor) -> Tensor:
    if part["kind"] == "all":
        return rank >= 0
    if part["kind"] == "at":
        return torch.isin(rank, torch.tensor(part["indices"], device=rank.device))
    if part["kind"] == "ends":
        half = n // 2 if part["halves"] else n
        return (rank < half.clamp(max=part["first"])) | (rank >= n - half.clamp(max=part["last"]))
    if part["percent"]:
        count = (n.float() * part["count"] / 100).round().long().clamp(min=1)
    else:
        count = n.clamp(min=1).clamp(max=int(part["count"]))
    if part["kind"] == "ratio":
        first = count // 2
        return (rank < first) | (rank >= n - (count - first))
    step = ((n - 1) // (count - 1).clamp(min=1)).clamp(min=1)
    return (rank % step == 0) & (rank // step < count)


class _Edit:
    """An edit of one module's output (or input)."""

    def __init__(self, record: Record, params: Mapping[str, Tensor], prompt: _Prompt) -> None:
        self.record, self.prompt = record, prompt
        self.delta = DELTAS[record["arithmetic"]](record, params)

    def __call__(self, h: Tensor) -> Tensor:
        record, prompt = self.record, self.prompt
        if record["tower"] == "llm" and prompt.decoding and not record["while_decoding"]:
            return h
        mask = prompt.mask(record, h)
        return h + torch.where(mask[..., None], self.delta(h), 0).to(h.dtype)


def _low_rank(record: Record, params: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    rotate, bias = params["rotate"], params["bias"]
    if record["half"]:  # the arithmetic of LLaVA Steering's code

        def half(h: Tensor) -> Tensor:
            weight, r = params["weight"].half().to(h.device), rotate.to(h.device)
            learned = h.half() @ weight.T + bias.half().to(h.device)
            return (learned - (h.float() @ r).half()).float() @ r.T

        return half
    down = params["weight"].T if "weight" in params else torch.zeros_like(rotate)
    down = down - rotate if record["subtracts"] else down
    return lambda h: (h.float() @ down.to(h.device) + bias.to(h.device)) @ rotate.T.to(h.device)


def _scale(record: Record, params: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    scale, bias = params["scale"] - 1, params["bias"]
    return lambda h: h.float() * scale.to(h.device) + bias.to(h.device)


def _constant(record: Record, params: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    vector = params["alpha"] * params["vector"]
    return lambda h: vector.to(h.device).expand(h.shape)


def _bottleneck(record: Record, params: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def delta(h: Tensor) -> Tensor:
        own = {name: x.to(h) for name, x in params.items()}
        low = torch.nn.functional.gelu(h @ own["down"] + own["down_bias"])
        return low @ own["up"] + own["up_bias"]

    return delta


DELTAS = {
    "low_rank": _low_rank,
    "scale": _scale,
    "constant": _constant,
    "bottleneck": _bottleneck,
}
