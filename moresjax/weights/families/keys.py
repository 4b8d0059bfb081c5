"""What the keys that many `config.json` files share mean here; each family adds its own.

Source: the configuration classes of transformers 5.24, and the settings that releases 3 and 4 wrote
into every file.
"""

from moresjax.core.config_keys import ConfigKeys

NEW_WEIGHTS = "it initialises new weights"
DROPOUT = "the base model runs without dropout"
OUTPUTS = "it chooses what a forward pass returns, not what it computes"
CLASSIFIER = "it belongs to a classification head"
ORIGIN = "it says where the file comes from"
SPEED = "it changes speed or memory only"
RELEASE_4 = "a setting of transformers 3 and 4 that changes no decoder and no encoder here"
COMPARISON = "what compares images with texts is not read"
TOKENS = "the tokenizer and generation_config.json say it"

# Everything that any class of transformers writes.
COMMON_KEYS = ConfigKeys(
    implemented=("model_type", "dtype", "torch_dtype"),
    neutral={
        "is_encoder_decoder": (False,),
        "quantization_config": (None,),  # refused with a sentence of its own
        "per_layer_config": (None,),
        "add_cross_attention": (False,),
        "cross_attention_hidden_size": (None,),
        "pruned_heads": (None, {}),
    },
    irrelevant={
        **dict.fromkeys(("transformers_version", "_name_or_path", "_commit_hash"), ORIGIN),
        **dict.fromkeys(("unsloth_fixed", "unsloth_version", "transformers.js_config"), ORIGIN),
        "architectures": "model_type names the architecture, the tensors are compared with it",
        "auto_map": "code of a folder never runs",
        **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), OUTPUTS),
        "tie_last_hidden_states": OUTPUTS,
        **dict.fromkeys(("id2label", "label2id", "problem_type", "num_labels"), CLASSIFIER),
        **dict.fromkeys(("chunk_size_feed_forward", "use_cache", "cache_implementation"), SPEED),
        **dict.fromkeys(("attn_implementation", "_attn_implementation"), SPEED),
        **dict.fromkeys(("_attn_implementation_autoset", "_flash_attn_2_enabled"), SPEED),
        **dict.fromkeys(("torchscript", "use_bfloat16", "tf_legacy_loss", "xla_device"), RELEASE_4),
        **dict.fromkeys(("tie_encoder_decoder", "is_decoder", "finetuning_task"), RELEASE_4),
        **dict.fromkeys(("task_specific_params", "tokenizer_class", "prefix"), RELEASE_4),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), TOKENS),
        **dict.fromkeys(("sep_token_id", "decoder_start_token_id"), TOKENS),
    },
)

LLM_KEYS = COMMON_KEYS | ConfigKeys(
    implemented=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
    ),
    neutral={
        # Not there, or off, in families that do not know them.
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_mrope": (False,),
        "rope_scaling": (None,),
        "sliding_window": (None,),
        "use_sliding_window": (False,),
    },
    irrelevant={
        **dict.fromkeys(("initializer_range",), NEW_WEIGHTS),
        **dict.fromkeys(("attention_dropout",), DROPOUT),
        "pretraining_tp": "it says how products are cut, not what they are",
        "max_sequence_length": "max_position_embeddings says it",
        "original_max_position_embeddings": "rope_parameters has what is read of it",
    },
)

# A vision encoder beside a text encoder, in one file.
TWO_TOWER_KEYS = COMMON_KEYS | ConfigKeys(
    implemented=("vision_config", "vision_config_dict"),
    irrelevant={
        **dict.fromkeys(("text_config", "text_config_dict"), "the text encoder is not read"),
        **dict.fromkeys(("projection_dim", "logit_scale_init_value"), COMPARISON),
        "initializer_factor": NEW_WEIGHTS,
        "initializer_range": NEW_WEIGHTS,
        "tie_word_embeddings": "an encoder has no word embeddings",
    },
)

VISION_KEYS = COMMON_KEYS | ConfigKeys(
    implemented=(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "layer_norm_eps",
        "hidden_act",
    ),
    neutral={"num_channels": (3,)},
    irrelevant={
        "initializer_range": NEW_WEIGHTS,
        "attention_dropout": DROPOUT,
        "dropout": DROPOUT,
        **dict.fromkeys(("model_name_or_path", "model_name_or_path2"), ORIGIN),
        "tie_word_embeddings": "an encoder has no word embeddings",
        "vocab_size": "an encoder has no word embeddings",
    },
)
