"""Random adapters of `peft` of the types that are read here, with random settings."""

# Models of transformers are modules, whose attributes no type checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch

from moresjax.testing.random_models import Draws

# What an adapter acts on: the last parts of the names of a model's linears, or of its norms.
Names = list[str]


def add_adapter(model: torch.nn.Module, rng: Draws) -> tuple[torch.nn.Module, str] | None:
    """The model of `peft` with random parameters, and the adapter in words.

    None stands for settings that `peft` itself does not accept for this model; it may have changed
    the model then.
    """
    kind = rng.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
    settings = _KINDS[kind][1](rng, model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(rng.getrandbits(32))
        try:
            config = getattr(peft, f"{kind}Config")(**settings)
            adapted = peft.get_peft_model(model, config).eval()
            adapted.create_or_update_model_card = lambda folder: None  # a fifth of a case's time
        except Exception:  # peft raises many kinds
            return None
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    shown = {key: value for key, value in settings.items() if key not in _PLAIN}
    return adapted, f"{kind} {shown}"


_PLAIN = ("task_type", "lora_dropout", "vera_dropout")


def _suffixes(model: torch.nn.Module, wanted: Callable[[torch.nn.Module], bool]) -> Names:
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if wanted(module)}
    return sorted(names - {"lm_head", "head"})


def _linears(rng: Draws, model: torch.nn.Module) -> Any:
    """Targets as people write them: a list of names, all linears, or a pattern."""
    names = _suffixes(model, lambda module: isinstance(module, torch.nn.Linear))
    chosen = rng.sample(names, rng.randint(1, min(len(names), 4)))
    if rng.random() < 0.1:
        return "all-linear"
    if _is_llava(model) and rng.random() < 0.6:
        return rf".*language_model.*\.({'|'.join(sorted(chosen))})"
    return sorted(chosen)


def _is_llava(model: torch.nn.Module) -> bool:
    return model.config.model_type == "llava"


def _rarely(rng: Draws, share: float, **settings: Any) -> dict[str, Any]:
    return settings if rng.random() < share else {}


def _layers(rng: Draws, model: torch.nn.Module, targets: Any) -> dict[str, Any]:
    """Some layers only, which `peft` takes with a list of targets."""
    text = getattr(model.config, "text_config", model.config)
    layer = rng.randrange(text.num_hidden_layers)
    chosen = rng.choice((layer, [layer]))
    return _rarely(rng, 0.2 * isinstance(targets, list), layers_to_transform=chosen)


def _lora(rng: Draws, model: torch.nn.Module) -> dict[str, Any]:
    targets = _linears(rng, model)
    first = targets[0] if isinstance(targets, list) else "q_proj"
    saved = rng.choice(["multi_modal_projector", "lm_head"] if _is_llava(model) else ["lm_head"])
    start = rng.choice((False, "gaussian", "pissa", "olora"))
    return {
        "task_type": "CAUSAL_LM",
        "r": rng.size(2, 1, 4),
        "lora_alpha": rng.choice((1, 8, 16)),
        "lora_dropout": rng.choice((0.0, 0.1)),
        "target_modules": targets,
        **_layers(rng, model, targets),
        **_rarely(rng, 0.2, use_rslora=True),
        **_rarely(rng, 0.25, use_dora=True),
        **_rarely(rng, 0.2, init_lora_weights=start),
        **_rarely(rng, 0.1, bias=rng.choice(("all", "lora_only"))),
        **_rarely(rng, 0.1, rank_pattern={first: 3}),
        **_rarely(rng, 0.1, alpha_pattern={first: 5}),
        **_rarely(rng, 0.1, modules_to_save=[saved]),
        **_rarely(rng, 0.05, lora_bias=True),
        **_rarely(rng, 0.05, exclude_modules=[first]),
        **_rarely(rng, 0.05, trainable_token_indices=[3, 4]),
    }


def _ia3(rng: Draws, model: torch.nn.Module) -> dict[str, Any]:
    targets = _linears(rng, model)
    feed = [name for name in targets if rng.random() < 0.5] if isinstance(targets, list) else []
    return {"task_type": "CAUSAL_LM", "target_modules": targets, "feedforward_modules": feed}


def _oft(rng: Draws, model: torch.nn.Module) -> dict[str, Any]:
    targets = _linears(rng, model)
    size = rng.choice(({"r": 0, "oft_block_size": 4}, {"r": 4, "oft_block_size": 0}))
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        **size,
        **_layers(rng, model, targets),
        "use_cayley_neumann": rng.random() < 0.6,
        **_rarely(rng, 0.1, num_cayley_neumann_terms=3),
        **_rarely(rng, 0.1, coft=True, eps=1e-2),
        **_rarely(rng, 0.1, block_share=True),
        **_rarely(rng, 0.1, bias="oft_only"),
    }


def _boft(rng: Draws, model: torch.nn.Module) -> dict[str, Any]:
    targets = _linears(rng, model)
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "boft_block_size": rng.size(4, 2),
        "boft_n_butterfly_factor": rng.size(2, 1),
        **_layers(rng, model, targets),
        **_rarely(rng, 0.1, bias="all"),
    }


def _vera(rng: Draws, model: torch.nn.Module) -> dict[str, Any]:
    targets = _linears(rng, model)
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "r": rng.size(2, 5),
        "projection_prng_key": rng.choice((0, 3)),
        "save_projection": rng.random() < 0.7,
        "d_initial": rng.choice((0.1, 1.0)),
        **_layers(rng, model, targets),
        **_rarely(rng, 0.1, bias="all"),
    }


def _ln(rng: Draws, model: torch.nn.Module) -> dict[str, Any]:
    names = _suffixes(model, lambda module: "Norm" in type(module).__name__)
    chosen = names if rng.random() < 0.6 else rng.sample(names, rng.randint(1, len(names)))
    return {"task_type": "CAUSAL_LM", "target_modules": sorted(chosen)}


def _virtual_tokens(rng: Draws, model: torch.nn.Module) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", "num_virtual_tokens": rng.size(3, 1)}


def _prefix(rng: Draws, model: torch.nn.Module) -> dict[str, Any]:
    projected = _rarely(rng, 0.2, prefix_projection=True, encoder_hidden_size=8)
    return _virtual_tokens(rng, model) | projected


# By the beginning of the name of the configuration: how often it is drawn, and its settings.
_KINDS: dict[str, tuple[int, Callable[[Draws, torch.nn.Module], dict[str, Any]]]] = {
    "Lora": (8, _lora),
    "IA3": (2, _ia3),
    "OFT": (2, _oft),
    "BOFT": (2, _boft),
    "Vera": (2, _vera),
    "LNTuning": (2, _ln),
    "PromptTuning": (1, _virtual_tokens),
    "PrefixTuning": (1, _prefix),
}
# Beside virtual tokens, `transformers` counts padding on the left as tokens.
RIGHT_ONLY = ("PromptTuning", "PrefixTuning")
