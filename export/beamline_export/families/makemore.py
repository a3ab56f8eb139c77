"""makemore's Transformer (Andrej Karpathy's), of characters: GPT-2 as one file of PyTorch has it, its head untied.

The folder holds `model.pt`, as makemore saves it, and a `config.json`: docs/bring-your-model.md describes it. Token 0
begins and ends every word; the characters of the words follow in their order.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from beamline_export.checkpoint import MOST_LAYERS, Fields, check_file, read_json, read_state_dict
from beamline_export.expectations import is_text
from beamline_export.families.decoder_only import DecoderSizes, take_ends
from beamline_export.families.gpt2 import take_blocks
from beamline_export.families.hugging_face import put_together
from beamline_export.families.search_settings import read_settings
from beamline_export.generation import read_generation
from beamline_export.reference import PromptedReference, Reference
from beamline_export.renamer import Renamer
from beamline_export.spec import Activation, Array, Checkpoint, ExportError, SpecialTokenIds
from beamline_export.state_names import name_state
from beamline_export.tokenizer_files import TokenizerFiles, with_around, without_tokenizer

_BASE, _EMBEDDING, _POSITIONS = "transformer", "transformer.wte.weight", "transformer.wpe.weight"
_START = 0
"""Begins and ends a word."""
_OWN_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id")
_FILE = "characters.json"
_USUAL_HEADS = 4
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.")
_ADVICE = "model.pt is expected as makemore saves its Transformer"


def read(folder: Path) -> Checkpoint:
    """Read a folder with makemore's Transformer.

    Raises:
        ExportError: config or weights are missing or contradict each other.
    """
    config = read_json(folder / "config.json")
    fields = Fields(config, "config.json")
    heads, text = fields.integer("n_head", _USUAL_HEADS), _characters(folder, fields)
    settings = dict(read_settings(fields, config, ("model_type",)))
    fields.problems += [f"{name} is makemore's own, {_START}; leave it out" for name in _OWN_TOKENS if name in settings]
    fields.check()
    state = name_state(read_state_dict(folder), {})
    sizes = _sizes(state.tensors, heads)
    spec = sizes.spec("makemore")
    settings = {"max_new_tokens": spec.max_target_positions - 1, **settings}
    generation = read_generation(
        {**settings, "bos_token_id": _START, "eos_token_id": _START},
        None,
        max_positions=spec.max_target_positions - 1,
        decoder_only=True,
    )
    tokenizer = _tokenizer(generation.tokens, text, spec.target_vocabulary)
    names = Renamer(state.tensors, state.origins)
    # Masks, which makemore keeps as buffers.
    names.ignore(r"transformer\.h\.\d+\.attn\.bias")
    take_ends(names, _EMBEDDING, ("lm_head.weight",), tied=False)
    take_blocks(names, spec, _BASE, transposed=False)
    names.weights["head.bias"] = np.zeros(spec.target_vocabulary, np.float32)
    return put_together(spec, names, generation, tokenizer, {}, state.notices)


def _characters(folder: Path, fields: Fields) -> str | None:
    """The characters of the words, in their order; None if config.json tells none."""
    text, file = fields.raw("characters"), fields.raw("words_file")
    if text is not None and file is not None:
        fields.problems.append("characters and words_file say the same; keep one of them")
    elif file is not None and (not isinstance(file, str) or Path(file).name != file):
        fields.problems.append(f"words_file must be the name of a file of the folder, not {str(file)[:60]!r}")
    elif file is not None:
        return _characters_of(folder / file)
    elif text is not None and (not isinstance(text, str) or not is_text(text) or len(set(text)) != len(text)):
        fields.problems.append("characters must be a text of whole characters in which none stands twice")
    elif text is not None:
        return str(text)
    return None


def _characters_of(file: Path) -> str:
    """As makemore finds them: one word per line, the characters of all of them, sorted."""
    check_file(file)
    try:
        words = (word.strip() for word in file.read_text("utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read ({error}); give the file of words that the model learned") from error
    return "".join(sorted(set("".join(words))))


def _sizes(tensors: Mapping[str, Array], heads: int) -> DecoderSizes:
    embedding, positions = tensors.get(_EMBEDDING), tensors.get(_POSITIONS)
    layers = {int(found[1]) for name in tensors if (found := _BLOCK.match(name)) and len(found[1]) < 6}
    if embedding is None or positions is None or not layers or embedding.ndim != 2 or positions.ndim != 2:
        raise ExportError(f"the weights are not makemore's Transformer: {_ADVICE}")
    (vocabulary, width), longest = embedding.shape, len(positions)
    if max(layers) >= MOST_LAYERS or longest < 2:
        raise ExportError(f"the model has {max(layers) + 1} layers and {longest} positions; {_ADVICE}")
    up = tensors.get(f"{_BASE}.h.0.mlp.c_fc.weight")
    return DecoderSizes(
        vocabulary=vocabulary,
        width=width,
        layers=max(layers) + 1,
        heads=heads,
        ffn=4 * width if up is None or not up.ndim else len(up),
        positions=longest,
        activation=Activation.GELU_TANH,
        norm_epsilon=1e-5,
    )


def _tokenizer(tokens: SpecialTokenIds, text: str | None, vocabulary: int) -> TokenizerFiles:
    if text is None:
        told = "config.json names no characters and no words_file, so requests carry token ids; add one of them"
        return dataclasses.replace(without_tokenizer(tokens, ends_sources=False), notices=(told,))
    if len(text) + 1 != vocabulary:
        raise ExportError(
            f"config.json: there are {len(text)} characters, the model has {vocabulary} tokens, which are one more; "
            "give the characters, or the words_file, that it learned"
        )
    content = json.dumps({character: number for number, character in enumerate(text, 1)}).encode()
    return TokenizerFiles("characters", {}, {}, with_around(tokens, _START, None), contents={_FILE: content})


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """GPT-2 as transformers runs it, with makemore's weights: the architecture is the same."""
    import torch
    import transformers

    spec = checkpoint.spec
    config = transformers.GPT2Config(
        vocab_size=spec.target_vocabulary,
        n_positions=spec.max_target_positions,
        n_embd=spec.d_model,
        n_layer=spec.decoder_layers,
        n_head=spec.decoder_heads,
        n_inner=spec.decoder_ffn,
        activation_function="gelu_new",
        layer_norm_epsilon=spec.norm_epsilon,
        tie_word_embeddings=False,
        bos_token_id=_START,
        eos_token_id=_START,
    )
    model: Any = transformers.GPT2LMHeadModel(config).eval()
    tensors = name_state(read_state_dict(folder), {}).tensors
    transposed = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
    state = {
        name: torch.from_numpy(np.ascontiguousarray(array.T if transposed.fullmatch(name) else array))
        for name, array in tensors.items()
        if not name.endswith(".attn.bias")
    }
    model.load_state_dict(state)
    return PromptedReference(model, checkpoint.removed_tokens)
