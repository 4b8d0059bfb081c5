"""Every key of `adapter_config.json` by the adapter's type, and why some are not read."""

from moresjax.core.config_keys import ConfigKeys

_BASE = "the base is the model that the adapter is attached to"
_INIT = "how training started; the tensors are trained"
_LINEAR = "peft takes it as false for torch.nn.Linear, which all linears here are there"
_ROTATION_DROPOUT = "dropout of whole rotations, in training only"


def _read_with(key: str) -> str:
    return f"read with {key} only"


_COMMON = ConfigKeys(
    implemented=("peft_type",),
    irrelevant={
        "auto_mapping": "the class that was wrapped",
        "base_model_name_or_path": _BASE,
        "revision": _BASE,
        "inference_mode": "what trains is decided here",
        "peft_version": "the format of OFT alone has changed",
        "task_type": "the class around the model; a head of its own would be a tensor",
    },
)
# Which modules an adapter acts on, and whole modules and biases that it replaces.
_MODULES = ConfigKeys(implemented=("target_modules", "exclude_modules", "modules_to_save"))
_LAYERS = _MODULES | ConfigKeys(
    implemented=("layers_to_transform", "layers_pattern"),
    choices={"bias": ("none", "all", "lora_only", "oft_only", "boft_only", "vera_only")},
)
_VIRTUAL_TOKENS = ConfigKeys(
    implemented=("num_virtual_tokens",),
    neutral={"num_transformer_submodules": (None, 1), "modules_to_save": (None, [])},
    irrelevant={
        "token_dim": "the model's own; the width of the tensor is checked",
        "num_attention_heads": "the model's own; the width of the tensor is checked",
        "num_layers": "the model's own; the width of the tensor is checked",
    },
)
_NOT_SET = (None, False, [], {})

_LORA = ConfigKeys(
    implemented=(
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "ensure_weight_tying",
    ),
    neutral=dict.fromkeys(
        (
            "trainable_token_indices",
            "target_parameters",
            "megatron_config",
            "velora_config",
            "alora_invocation_tokens",
            "use_qalora",
            "monteclora_config",
            "layer_replication",
            "lora_bias",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
        ),
        _NOT_SET,
    ),
    irrelevant={
        "fan_in_fan_out": _LINEAR,
        "megatron_core": _read_with("megatron_config"),
        "qalora_group_size": _read_with("use_qalora"),
        "runtime_config": "where weights are kept in memory",
        **dict.fromkeys(
            ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
            _read_with("init_lora_weights"),
        ),
    },
)
_OFT = ConfigKeys(
    implemented=("r", "oft_block_size", "use_cayley_neumann", "peft_version"),
    neutral={"coft": _NOT_SET, "block_share": _NOT_SET, "num_cayley_neumann_terms": (5,)},
    irrelevant={
        "fan_in_fan_out": _LINEAR,
        "init_weights": _INIT,
        "eps": _read_with("coft"),
        "module_dropout": _ROTATION_DROPOUT,
    },
)
_BOFT = ConfigKeys(
    implemented=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    irrelevant={
        "fan_in_fan_out": _LINEAR,
        "init_weights": _INIT,
        "boft_dropout": _ROTATION_DROPOUT,
    },
)
_VERA = ConfigKeys(
    implemented=("r", "projection_prng_key", "save_projection", "vera_dropout"),
    irrelevant={"fan_in_fan_out": _LINEAR, "init_weights": _INIT, "d_initial": _INIT},
)
_IA3 = ConfigKeys(
    implemented=("feedforward_modules",),
    irrelevant={"fan_in_fan_out": _LINEAR, "init_ia3_weights": _INIT},
)
_PROMPT = ConfigKeys(
    irrelevant={
        "prompt_tuning_init": _INIT,
        "prompt_tuning_init_text": _INIT,
        "tokenizer_name_or_path": _INIT,
        "tokenizer_kwargs": _INIT,
    }
)
_PREFIX = ConfigKeys(
    irrelevant={
        "init_weights": _INIT,
        "prefix_projection": "what the projection made is what is saved",
        "encoder_hidden_size": _read_with("prefix_projection"),
    }
)

KEYS: dict[str, ConfigKeys] = {
    "LORA": _COMMON | _LAYERS | _LORA,
    "IA3": _COMMON | _MODULES | _IA3,
    "OFT": _COMMON | _LAYERS | _OFT,
    "BOFT": _COMMON | _LAYERS | _BOFT,
    "VERA": _COMMON | _LAYERS | _VERA,
    "LN_TUNING": _COMMON | _MODULES,
    "PROMPT_TUNING": _COMMON | _VIRTUAL_TOKENS | _PROMPT,
    "PREFIX_TUNING": _COMMON | _VIRTUAL_TOKENS | _PREFIX,
}
