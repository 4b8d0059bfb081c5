"""What `generation_config.json` says about generation, as `transformers` reads it."""

from pathlib import Path
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.json_files import read_object, write_json
from moresjax.data.processor import GenerationDefaults

FILE = "generation_config.json"
CALLER = "who calls `generate` says it; answers are greedy by default"
SEARCH = "it belongs to beam searches, which the caller chooses"
SPEED = "it changes speed or memory only"
OUTPUTS = "it chooses what is returned"

# Every setting of a `GenerationConfig` of transformers 5.24. What would change greedy answers and
# is not implemented has only its neutral value.
GENERATION_KEYS = ConfigKeys(
    implemented=("eos_token_id", "repetition_penalty"),
    neutral={
        **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), (None, 0)),
        "encoder_no_repeat_ngram_size": (None, 0),
        "encoder_repetition_penalty": (None, 1.0),
        "guidance_scale": (None, 1.0),
        **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints"), (None, [])),
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (None, [])),
        **dict.fromkeys(("stop_strings", "sequence_bias"), (None, [], {})),
        **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), (None,)),
        **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config"), (None,)),
        **dict.fromkeys(("dola_layers", "max_time"), (None,)),
        "penalty_alpha": (None, 0.0),
        "token_healing": (None, False),
    },
    irrelevant={
        **dict.fromkeys(("max_length", "max_new_tokens", "do_sample"), CALLER),
        **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "top_h"), CALLER),
        **dict.fromkeys(("typical_p", "epsilon_cutoff", "eta_cutoff"), CALLER),
        **dict.fromkeys(("num_beams", "early_stopping", "length_penalty"), SEARCH),
        **dict.fromkeys(("num_beam_groups", "diversity_penalty"), SEARCH),
        **dict.fromkeys(("renormalize_logits", "num_return_sequences"), SEARCH),
        "remove_invalid_values": "logits that are no numbers are an error here",
        **dict.fromkeys(("use_cache", "cache_implementation", "cache_config"), SPEED),
        **dict.fromkeys(("max_cache_len", "use_mtp", "speculation_type"), SPEED),
        **dict.fromkeys(("is_assistant", "num_assistant_tokens"), SPEED),
        **dict.fromkeys(("num_assistant_tokens_schedule", "assistant_early_exit"), SPEED),
        **dict.fromkeys(("assistant_confidence_threshold", "assistant_lookbehind"), SPEED),
        **dict.fromkeys(("assistant_ensemble_weight", "target_lookbehind"), SPEED),
        **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size"), SPEED),
        **dict.fromkeys(("compile_config", "disable_compile", "low_memory"), SPEED),
        **dict.fromkeys(("continuous_batching_config", "prefill_chunk_size"), SPEED),
        **dict.fromkeys(("output_attentions", "output_hidden_states"), OUTPUTS),
        **dict.fromkeys(("output_scores", "output_logits"), OUTPUTS),
        "return_dict_in_generate": OUTPUTS,
        **dict.fromkeys(("pad_token_id", "bos_token_id"), "the tokenizer says it"),
        "decoder_start_token_id": "a decoder-only model has none",
        **dict.fromkeys(("transformers_version", "_from_model_config"), "where it comes from"),
    },
)


def read_generation_config(folder: Path) -> GenerationDefaults:
    """What a folder says about generation: `generation_config.json`, without it `config.json`.

    Args:
      folder: A folder of `transformers`, or one with a tokenizer alone, which says nothing.

    Raises:
      UserError: The file is damaged, or has a setting that would be ignored.
    """
    if (folder / FILE).is_file():
        values = read_object(folder / FILE)
        GENERATION_KEYS.check(values, str(folder / FILE))
        penalty = values.get("repetition_penalty")
        return GenerationDefaults(_ids(values), 1.0 if penalty is None else float(penalty))
    if not (folder / "config.json").is_file():
        return GenerationDefaults()
    config = read_object(folder / "config.json")
    text = config.get("text_config")
    return GenerationDefaults(_ids(config) or _ids(text if isinstance(text, dict) else {}))


def save_generation_config(folder: Path, defaults: GenerationDefaults) -> None:
    """Writes what `read_generation_config` reads; nothing where all is as without a file."""
    values: dict[str, Any] = {}
    if defaults.eos_ids:
        values["eos_token_id"] = list(defaults.eos_ids)
    if defaults.repetition_penalty != 1:
        values["repetition_penalty"] = defaults.repetition_penalty
    if values:
        write_json(folder / FILE, values)


def _ids(values: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens, given as one id, as a list or not at all."""
    found = values.get("eos_token_id")
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)
