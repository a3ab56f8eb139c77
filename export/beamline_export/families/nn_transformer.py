"""A plain `torch.nn.Transformer` with embeddings and a generator: the model of "Attention is all you need".

The folder holds `model.safetensors` or `model.pt` and a `config.json`; docs/bring-your-model.md describes both.
"""

import dataclasses
from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np

from beamline_export.checkpoint import read_json, read_state_dict
from beamline_export.families.buffers import as_table, leave_out_masks, take_sinusoids
from beamline_export.families.nn_config import TIES, Config, read_config
from beamline_export.families.nn_layouts import LEARNED_POSITIONS, SHARED_POSITIONS, SOURCE_POSITIONS, TARGET_POSITIONS
from beamline_export.families.nn_reference import NnReference
from beamline_export.reference import Reference
from beamline_export.renamer import Renamer
from beamline_export.spec import Checkpoint, ExportError
from beamline_export.state_names import NamedState, name_state, unknown_targets

_ADVICE = (
    'where names differ, "names" or "layout" in config.json tell which is which; '
    'where one table serves as several, "tie_embeddings" does; where parts differ, correct the config'
)
_NO_END = (
    "config.json names no eos_token_id: no output ever ends by itself, each has max_new_tokens tokens; "
    "add it if the model has one"
)
_MOST_LEFT_OUT = 5
"""Names in one notice."""
_FILES_OF_TRANSFORMERS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def read(folder: Path) -> Checkpoint:
    """Read a folder with an `nn.Transformer`.

    Raises:
        ExportError: config or weights are missing or contradict each other.
    """
    config = read_config(read_json(folder / "config.json"))
    generation = config.generation
    kind, files = _tokenizer(folder)
    state = name_state(read_state_dict(folder), config.names)
    names = _rename(config, state)
    notices = [*state.notices, *_left_out(state, names.known), *names.notices]
    notices += [*([] if generation.tokens.eos else [_NO_END]), *_not_read(folder)]
    return Checkpoint(
        config.spec,
        names.weights,
        dataclasses.replace(generation.tokens, source_bos=config.source_bos, source_eos=config.source_eos),
        generation.defaults,
        kind,
        files,
        generation.removed,
        names.names,
        names.foreign(),
        advice=_ADVICE,
        notices=tuple(notices),
    )


def _rename(config: Config, state: NamedState) -> Renamer:
    names = Renamer(state.tensors, state.origins)
    _take_embeddings(names, config)
    config.layout.take_stacks(names, config.spec)
    if config.learned_positions:
        _take_learned_positions(names, config.spec.d_model)
    if problems := list(unknown_targets(config.names, names.known | LEARNED_POSITIONS)):
        raise ExportError(f"config.json: names: {'; '.join(problems)}")
    if not config.learned_positions:
        take_sinusoids(names, config.spec)
    leave_out_masks(names)
    names.tell_absent_biases(state.left_out.values())
    return names


def _left_out(state: NamedState, known: Set[str]) -> Iterator[str]:
    """What the user should know of what `names` leaves out: a bias that the model has is zero then."""
    zeros = [o for o, name in state.left_out.items() if name in known - state.tensors.keys() and name.endswith("bias")]
    for origins, effect in (
        (zeros, "; the model has zeros there"),
        ([origin for origin in state.left_out if origin not in zeros], ""),
    ):
        more = f" and {len(origins) - _MOST_LEFT_OUT} more" if len(origins) > _MOST_LEFT_OUT else ""
        verb = "is" if len(origins) == 1 else "are"
        if origins:
            shown = ", ".join(origins[:_MOST_LEFT_OUT])
            yield f"{shown}{more} {verb} left out, as names in config.json says{effect}"


def _take_embeddings(names: Renamer, config: Config) -> None:
    tables = config.tables()
    for table, candidates in tables.items():
        names.take(table, *candidates)
    names.share_equal(*tables)
    if config.tied:
        said = next(text for text, tied in TIES.items() if tied == config.tied)
        names.tell_untied(f"tie_embeddings is {said}", *config.tied)
    names.take("head.bias", f"{config.layout.generator}.bias")
    names.weights.setdefault("head.bias", np.zeros(config.spec.target_vocabulary, np.float32))


def _take_learned_positions(names: Renamer, width: int) -> None:
    for side, name in (("source_positions", SOURCE_POSITIONS), ("target_positions", TARGET_POSITIONS)):
        names.take(side, name, SHARED_POSITIONS)
        table = as_table(names.weights[side], width) if side in names.weights else None
        if table is not None:
            names.weights[side] = table
    names.share_equal("source_positions", "target_positions")


def _tokenizer(folder: Path) -> tuple[str, dict[str, str]]:
    if (folder / "tokenizer.json").exists():
        both = ("tokenizer.json", "target_tokenizer.json")
        return "tokenizers", {name: name for name in both if (folder / name).exists()}
    models = {name: name for name in ("source.spm", "target.spm") if (folder / name).exists()}
    if len(models) == 1:
        raise ExportError(f"{folder} holds only one of source.spm and target.spm; copy both, even if they are the same")
    return ("sentencepiece", models) if models else ("none", {})


def _not_read(folder: Path) -> Iterator[str]:
    """What the user should know of files that have their effect with other families alone."""
    if found := [name for name in _FILES_OF_TRANSFORMERS if (folder / name).exists()]:
        yield f"{', '.join(found)}: not read; config.json and the tokenizer's own files say everything"


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model as PyTorch runs it."""
    config = read_config(read_json(folder / "config.json"))
    state = name_state(read_state_dict(folder), config.names)
    return NnReference(config, state.tensors, checkpoint.removed_tokens)
