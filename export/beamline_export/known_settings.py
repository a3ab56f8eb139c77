"""Every setting that a checkpoint's files may have: which are read, which change no answer, and which have no effect.

Names are those of transformers' `GenerationConfig`, `MarianConfig`, `BartConfig` and tokenizer classes, of this version
and of those before. What a table does not know is told to the user, too.
"""

import json
from collections.abc import Mapping
from typing import Any

READ = "read"
"""Has its effect; whoever reads it tells what is not supported of it."""
ANY = "any"
"""Changes no answer, whatever its value."""

_MOST_TOLD = 64
_LONGEST_TOLD = 200

Effect = str | tuple[Any, ...]
"""`READ`, `ANY`, or the only values that change no answer; null never does."""


def _all(effect: Effect, names: str) -> dict[str, Effect]:
    return dict.fromkeys(names.split(), effect)


GENERATION: Mapping[str, Effect] = {
    **_all(
        READ,
        "max_length max_new_tokens min_length min_new_tokens early_stopping num_beams num_return_sequences "
        "length_penalty bad_words_ids suppress_tokens begin_suppress_tokens renormalize_logits forced_bos_token_id "
        "forced_eos_token_id pad_token_id bos_token_id eos_token_id decoder_start_token_id",
    ),
    # Of sampling, which do_sample turns on.
    **_all(ANY, "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff"),
    # What `generate` returns beside the tokens, and how it computes them.
    **_all(ANY, "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate"),
    **_all(ANY, "use_cache cache_config max_cache_len prefill_chunk_size compile_config disable_compile low_memory"),
    **_all(ANY, "continuous_batching_config remove_invalid_values"),
    # Of a second, faster model, whose guesses the model itself checks.
    **_all(ANY, "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold"),
    **_all(ANY, "assistant_lookbehind target_lookbehind assistant_early_exit prompt_lookup_num_tokens"),
    **_all(ANY, "max_matching_ngram_size speculation_type"),
    **_all(ANY, "transformers_version _from_model_config _commit_hash"),
    **_all((False,), "do_sample use_mtp token_healing"),
    **_all((0,), "no_repeat_ngram_size encoder_no_repeat_ngram_size diversity_penalty penalty_alpha"),
    **_all((1,), "repetition_penalty encoder_repetition_penalty num_beam_groups guidance_scale"),
    **_all((), "max_time stop_strings exponential_decay_length_penalty sequence_bias watermarking_config"),
    **_all((), "assistant_ensemble_weight dola_layers constraints force_words_ids forced_decoder_ids"),
    "cache_implementation": ("dynamic", "dynamic_full", "static", "hybrid", "offloaded", "offloaded_static"),
}

# The comparison with PyTorch shows what of these a family does not read although it changes the model.
_ALL_CONFIGS: Mapping[str, Effect] = {
    **_all(READ, "d_model vocab_size tie_word_embeddings"),
    **_all(READ, "pad_token_id bos_token_id eos_token_id decoder_start_token_id forced_eos_token_id model_type"),
    # Of training, of other tasks, and of how results are returned.
    **_all(ANY, "classifier_dropout id2label label2id num_labels problem_type use_cache output_hidden_states"),
    **_all(ANY, "return_dict dtype chunk_size_feed_forward architectures transformers_version"),
    "is_encoder_decoder": (True,),
    **_all((False,), "is_decoder"),
    **_all((), "per_layer_config"),
}
_CONFIG: dict[str, Effect] = {
    **_ALL_CONFIGS,
    **_all(READ, "max_position_embeddings activation_function scale_embedding"),
    **_all(READ, "encoder_layers encoder_attention_heads encoder_ffn_dim"),
    **_all(READ, "decoder_layers decoder_attention_heads decoder_ffn_dim"),
    # Of training.
    **_all(ANY, "dropout attention_dropout activation_dropout encoder_layerdrop decoder_layerdrop init_std"),
    **_all(ANY, "tie_last_hidden_states"),
}
# What old checkpoints say of the architecture; today's classes know it by themselves.
_CONFIG |= _all(READ, "normalize_before add_final_layer_norm normalize_embedding static_position_embeddings")
_OFFSET_OF_TWO: Mapping[str, Effect] = {**_CONFIG, "extra_pos_embeddings": (2,)}
_T5: Mapping[str, Effect] = {
    **_ALL_CONFIGS,
    **_all(READ, "d_kv d_ff num_heads num_layers num_decoder_layers n_positions layer_norm_epsilon feed_forward_proj"),
    **_all(READ, "relative_attention_num_buckets relative_attention_max_distance scale_decoder_outputs"),
    **_all(READ, "is_gated_act dense_act_fn hidden_size num_attention_heads num_hidden_layers head_dim"),
    # Of training.
    **_all(ANY, "dropout_rate initializer_factor gradient_checkpointing"),
}
_DECODER_ONLY: dict[str, Effect] = {
    **_ALL_CONFIGS,
    "is_encoder_decoder": (False,),
    # Of an encoder's outputs, which it has only as a part of another model.
    "is_decoder": ANY,
    **_all(READ, "hidden_size num_hidden_layers num_attention_heads max_position_embeddings"),
    # Of training, and of how weights were laid out over devices.
    **_all(ANY, "initializer_range gradient_checkpointing pretraining_tp summary_type summary_use_proj"),
    **_all(ANY, "summary_activation summary_first_dropout summary_proj_to_labels"),
}
_ROTARY = _all(READ, "rope_parameters rope_scaling rope_theta original_max_position_embeddings partial_rotary_factor")
_LLAMA: Mapping[str, Effect] = {
    **_DECODER_ONLY,
    **_ROTARY,
    **_all(READ, "intermediate_size num_key_value_heads head_dim hidden_act rms_norm_eps attention_bias mlp_bias"),
    **_all(ANY, "attention_dropout"),
}
CONFIG: Mapping[str, Mapping[str, Effect]] = {
    "marian": {**_CONFIG, **_all(READ, "decoder_vocab_size share_encoder_decoder_embeddings")},
    "bart": _OFFSET_OF_TWO,
    "mbart": _OFFSET_OF_TWO,
    "m2m_100": _CONFIG,
    "pegasus": _CONFIG,
    # The setting of a search that its config class has; where it counts, it is told of as such.
    "blenderbot": {**_CONFIG, **_all(ANY, "encoder_no_repeat_ngram_size")},
    "blenderbot-small": _CONFIG,
    "plbart": _OFFSET_OF_TWO,
    "mvp": {**_OFFSET_OF_TWO, **_all(READ, "use_prompt"), **_all(ANY, "prompt_length prompt_mid_dim")},
    "fsmt": {
        **_CONFIG,
        **_all(READ, "src_vocab_size tgt_vocab_size num_beams max_length length_penalty early_stopping"),
        **_all(ANY, "langs"),
    },
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "gpt2": {
        **_DECODER_ONLY,
        **_all(READ, "n_embd n_layer n_head n_inner n_positions n_ctx activation_function layer_norm_epsilon"),
        **_all(READ, "scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn add_cross_attention"),
        **_all(ANY, "resid_pdrop embd_pdrop attn_pdrop"),
    },
    "gpt_neox": {
        **_DECODER_ONLY,
        **_ROTARY,
        **_all(READ, "intermediate_size hidden_act layer_norm_eps use_parallel_residual attention_bias"),
        **_all(READ, "rotary_pct rotary_emb_base"),
        **_all(ANY, "attention_dropout hidden_dropout"),
    },
    "opt": {
        **_DECODER_ONLY,
        **_all(READ, "ffn_dim activation_function do_layer_norm_before _remove_final_layer_norm word_embed_proj_dim"),
        **_all(READ, "enable_bias layer_norm_elementwise_affine"),
        **_all(ANY, "dropout attention_dropout layerdrop init_std"),
    },
    "llama": _LLAMA,
    "mistral": {**_LLAMA, **_all(READ, "sliding_window")},
    "qwen2": {**_LLAMA, **_all(READ, "sliding_window use_sliding_window max_window_layers layer_types")},
}
"""By family. Names that are not here belong to the checkpoint's owner: config.json often has some, and none counts."""

ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}
"""Other names of config.json's fields, which transformers prefer where both are given."""
T5_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
"""The same of T5's."""

_TOKENIZER: Mapping[str, Effect] = {
    **_all(READ, "clean_up_tokenization_spaces tokenizer_class eos_token added_tokens_decoder"),
    **_all(READ, "bos_token unk_token sep_token pad_token cls_token mask_token"),
    **_all(READ, "extra_special_tokens additional_special_tokens model_specific_special_tokens"),
    # Text is never longer or shorter than it is; only a request that asks for it has its source cut, at its end.
    **_all(ANY, "model_max_length max_len max_length stride truncation_strategy padding_side pad_to_multiple_of"),
    **_all(ANY, "pad_token_type_id token_type_ids_pattern token_type_ids_include_special_tokens padding truncation"),
    "truncation_side": ("right",),
    # Special tokens in a text are split whatever this says.
    "split_special_tokens": ANY,
    **_all(ANY, "chat_template response_template response_schema chat_control_tokens model_input_names"),
    **_all(ANY, "name_or_path _name_or_path processor_class verbose backend files_loaded is_local local_files_only"),
    **_all(
        ANY, "vocab_file merges_file tokenizer_file special_tokens_map_file added_tokens_file tokenizer_config_file"
    ),
    **_all(ANY, "init_inputs auto_map use_fast from_slow legacy _commit_hash transformers_version"),
    # Without effect in transformers of today.
    **_all(ANY, "add_bos_token add_eos_token spaces_between_special_tokens errors trim_offsets special"),
    **_all((False,), "do_lower_case fix_mistral_regex"),
}
_TOKENIZERS: Mapping[str, Effect] = {
    **_TOKENIZER,
    **_all(READ, "add_prefix_space clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
    # Built out of the files by the tokenizer's own class; a file that sets one cannot be loaded by it, or in vain.
    **_all((), "vocab merges post_processor tokenizer_object gguf_file unk_id tokenizer tokenizer_padding"),
    **_all((), "tokenizer_truncation _json_truncation _json_padding _spm_precompiled_charsmap"),
}
_T5_TOKENIZER: Mapping[str, Effect] = {
    **_TOKENIZERS,
    # Tokens that stand for what is left out of a text, which the files have; what ByT5's class does by itself.
    **_all(ANY, "extra_ids special_tokens_pattern"),
    **_all((), "sp_model_kwargs add_prefix_space"),
}
TOKENIZER: Mapping[str, Mapping[str, Effect]] = {
    "marian": {
        **_TOKENIZER,
        **_all(READ, "separate_vocabs"),
        **_all((), "sp_model_kwargs"),
        # Of a normalizer of punctuation that transformers load and do not call.
        **_all(ANY, "source_lang target_lang source_spm target_spm vocab target_vocab_file special_tokens_pattern"),
        # Of byte pairs, which it has none of.
        **_all(ANY, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
    },
    "m2m_100": {
        **_TOKENIZER,
        **_all(READ, "src_lang language_codes"),
        **_all((), "sp_model_kwargs"),
        **_all(ANY, "tgt_lang num_madeup_words spm_file special_tokens_pattern"),
        # Of byte pairs, which it has none of.
        **_all(ANY, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
    },
    "blenderbot-small": {
        **_TOKENIZER,
        # Written by its class in vain: it makes all text lower case.
        **_all(ANY, "do_lower_case add_prefix_space special_tokens_pattern"),
        # Of byte pairs of the tokenizers library, which it is not of.
        **_all(ANY, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
    },
    "fsmt": {
        **_TOKENIZER,
        **_all(READ, "langs do_lower_case"),
        **_all(ANY, "src_vocab_file tgt_vocab_file special_tokens_pattern"),
        # Of byte pairs of the tokenizers library, which it is not of.
        **_all(ANY, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
    },
    "plbart": {
        **_TOKENIZER,
        **_all(READ, "src_lang language_codes"),
        **_all((), "sp_model_kwargs"),
        "legacy": (True,),
        **_all(ANY, "tgt_lang special_tokens_pattern"),
        # Of byte pairs, which it has none of.
        **_all(ANY, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
    },
    "bart": _TOKENIZERS,
    "bart_relatives": {
        **_TOKENIZERS,
        **_all(READ, "src_lang legacy_behaviour"),
        # The target's language is what forced_bos_token_id says; the others have had their effect on the file.
        **_all(ANY, "tgt_lang language_codes mask_token_sent offset sp_model_kwargs"),
    },
    "t5": _T5_TOKENIZER,
    "mt5": _T5_TOKENIZER,
    "umt5": _T5_TOKENIZER,
    # Of chats, which texts are not made into.
    "decoder_only": {**_TOKENIZERS, **_all(ANY, "use_default_system_prompt")},
}
"""Keys of tokenizer_config.json and special_tokens_map.json, by family."""


def without_effect(settings: Mapping[str, Any], known: Mapping[str, Effect], *, name_unknown: bool) -> dict[str, str]:
    """Settings that would change answers and do not, or that nobody knows, with their values as JSON."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        effect = known.get(name)
        if effect is None and name_unknown:
            found[name] = f"{json.dumps(value)} (an unknown name)"
        elif isinstance(effect, tuple) and value not in (None, [], {}, *effect):
            found[name] = json.dumps(value)
    return found


def bounded(ignored: Mapping[str, str]) -> dict[str, str]:
    """Settings without effect as they are told everywhere: some checkpoints hold lists of millions of ids."""
    told = {_cut(name): _cut(value) for name, value in sorted(ignored.items())[:_MOST_TOLD]}
    if (more := len(ignored) - _MOST_TOLD) > 0:
        told["…"] = f"and {more} more"
    return told


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TOLD else f"{text[: _LONGEST_TOLD - 1]}…"


def contradictions(config: Mapping[str, Any], aliases: Mapping[str, str] = ALIASES) -> list[str]:
    """Fields of config.json that are given under two names with different values."""
    pairs = ((alias, config.get(alias), name, config.get(name)) for alias, name in aliases.items())
    return [
        f"{alias} {a!r} and {name} {b!r} are the same field with two values; remove the wrong one"
        for alias, a, name, b in pairs
        if a is not None and b is not None and a != b
    ]
