"""What Hugging Face's relatives of BART share: one description of a family, and one way to read a folder by it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beamline_export.checkpoint import (
    MOST_LAYERS,
    MOST_POSITIONS,
    Fields,
    read_json,
    read_optional_json,
    read_state_dict,
)
from beamline_export.families.activations import ACTIVATIONS
from beamline_export.families.bart_like_weights import Tables, Ties, rename
from beamline_export.families.hugging_face import put_together
from beamline_export.families.positions import Table
from beamline_export.generation import read_generation
from beamline_export.known_settings import CONFIG, contradictions, without_effect
from beamline_export.reference import HuggingFaceReference, Reference
from beamline_export.spec import (
    Checkpoint,
    ExportError,
    NormPlacement,
    PaddingInTarget,
    SpecialTokenIds,
    TransformerSpec,
    UnnumberedPadding,
)
from beamline_export.tokenizer_files import TokenizerFiles

_COMPUTED_TABLES = r"model\.(encoder|decoder)\.embed_positions\.weight"
_MOST_COMPARED = 512
"""Positions of the model that an export is compared with where transformers compute a table number by number."""


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """Position tables that were trained.

    Attributes:
        offset: The row of position 0; rows before it are never read.
    """

    offset: int


@dataclass(frozen=True, slots=True)
class SinusoidalPositions:
    """Position tables that are computed, unless the file has them.

    Attributes:
        table: Positions and width to (positions, width).
        padding: What a target's padding tokens have, where the model does not number them. Position 0 is then the row
            after that of the padding token's id, which is zero.
        slow: Whether transformers compute it number by number.
    """

    table: Table
    padding: PaddingInTarget | None = None
    slow: bool = False


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """DecoderSizes of a family's vocabularies, and which tables of them are one."""

    source: int
    target: int
    ties: Ties


@dataclass(frozen=True, slots=True)
class Folder:
    """What is known of a folder before its tokenizer is read.

    Attributes:
        path: The folder.
        config: config.json, with the family's defaults.
        spec: The architecture.
        tokens: Special tokens as the decoder's settings have them.
        one_vocabulary: Whether source and target have one.
    """

    path: Path
    config: Mapping[str, Any]
    spec: TransformerSpec
    tokens: SpecialTokenIds
    one_vocabulary: bool


def one_vocabulary(fields: Fields) -> Vocabularies:
    """One vocabulary, and one table for source, target and head unless `tie_word_embeddings` says otherwise."""
    size, tied = fields.integer("vocab_size", least=2), fields.flag("tie_word_embeddings", True)
    return Vocabularies(size, size, Ties(head=tied, sides=tied))


@dataclass(frozen=True, slots=True, kw_only=True)
class BartLike:
    """A family of Hugging Face's that differs from BART by values alone.

    Attributes:
        model_type: Its name in config.json.
        model_class: Its class in transformers.
        positions: Where position tables come from.
        norm_placement: Where the norms of the layers stand.
        embedding_norm: Whether embeddings are normalized.
        target_norm_before_positions: Whether those of the decoder are before positions are added.
        final_norms: Whether both stacks end with a norm.
        tables: Names of the embeddings.
        head_bias: Whether the head has a bias, `final_logits_bias`.
        vocabularies: Reads their sizes and ties.
        tokenizer: Reads the tokenizer.
        defaults: What the family's config class takes for what config.json does not say, where it changes answers.
        fixed: Settings of which one value alone is supported, beside those that the attributes above tell.
    """

    model_type: str
    model_class: str
    positions: LearnedPositions | SinusoidalPositions
    tokenizer: Callable[[Folder], TokenizerFiles]
    norm_placement: NormPlacement = NormPlacement.POST
    embedding_norm: bool = False
    target_norm_before_positions: bool = False
    final_norms: bool = False
    tables: Tables = field(default_factory=Tables)
    head_bias: bool = True
    vocabularies: Callable[[Fields], Vocabularies] = one_vocabulary
    defaults: Mapping[str, object] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)

    def read(self, folder: Path) -> Checkpoint:
        """Read a folder of this family.

        Raises:
            ExportError: config, weights or tokenizer files are missing or contradict each other.
        """
        config = {**self.defaults, **read_json(folder / "config.json")}
        fields = Fields(config, "config.json")
        for name, value in {**self._told_in_config(), **self.fixed}.items():
            fields.must_be(name, value)
        vocabularies = self.vocabularies(fields)
        spec = self._read_spec(fields, vocabularies)
        fields.problems += contradictions(config)
        fields.check()
        generation = read_generation(
            config, read_optional_json(folder / "generation_config.json"), max_positions=spec.max_target_positions
        )
        _check_start(spec, generation.tokens)
        tokenizer = self.tokenizer(Folder(folder, config, spec, generation.tokens, vocabularies.ties.sides))
        names = rename(
            spec,
            vocabularies.ties,
            read_state_dict(folder),
            tables=self.tables,
            head_bias=self.head_bias,
            positions=self.positions.offset if isinstance(self.positions, LearnedPositions) else self.positions.table,
        )
        ignored = without_effect(config, CONFIG[self.model_type], name_unknown=False)
        return put_together(spec, names, generation, tokenizer, ignored)

    def reference(self, folder: Path, checkpoint: Checkpoint) -> Reference:
        """The model as transformers runs it."""
        computed = {"source_positions", "target_positions"}.isdisjoint(checkpoint.weight_names)
        sinusoidal = self.positions if isinstance(self.positions, SinusoidalPositions) else None
        return HuggingFaceReference(
            self.model_class,
            folder,
            checkpoint.removed_tokens,
            most_positions=_MOST_COMPARED if sinusoidal and sinusoidal.slow and computed else None,
            token_by_token=checkpoint.spec.unnumbered_padding is not None,
            computed=_COMPUTED_TABLES if sinusoidal else "",
        )

    def _told_in_config(self) -> dict[str, object]:
        """What old checkpoints say of what the family fixes."""
        return {
            "normalize_before": self.norm_placement is NormPlacement.PRE,
            "add_final_layer_norm": self.final_norms,
            "normalize_embedding": self.embedding_norm,
            "static_position_embeddings": isinstance(self.positions, SinusoidalPositions),
        }

    def _read_spec(self, fields: Fields, vocabularies: Vocabularies) -> TransformerSpec:
        d_model = fields.integer("d_model")
        positions = fields.integer("max_position_embeddings", most=MOST_POSITIONS)
        return TransformerSpec(
            architecture=self.model_type,
            d_model=d_model,
            encoder_layers=fields.integer("encoder_layers", most=MOST_LAYERS),
            decoder_layers=fields.integer("decoder_layers", most=MOST_LAYERS),
            encoder_heads=fields.integer("encoder_attention_heads"),
            decoder_heads=fields.integer("decoder_attention_heads"),
            encoder_ffn=fields.integer("encoder_ffn_dim"),
            decoder_ffn=fields.integer("decoder_ffn_dim"),
            norm_placement=self.norm_placement,
            activation=fields.choice("activation_function", ACTIVATIONS, "gelu"),
            source_vocabulary=vocabularies.source,
            target_vocabulary=vocabularies.target,
            max_source_positions=positions,
            max_target_positions=positions,
            embedding_scale=math.sqrt(d_model) if fields.flag("scale_embedding", False) else 1.0,
            embedding_norm=self.embedding_norm,
            target_norm_before_positions=self.target_norm_before_positions,
            unnumbered_padding=self._padding(fields, vocabularies),
            encoder_final_norm=self.final_norms,
            decoder_final_norm=self.final_norms,
        )

    def _padding(self, fields: Fields, vocabularies: Vocabularies) -> UnnumberedPadding | None:
        pad = fields.optional_id("pad_token_id")
        # Whatever generation_config.json says: transformers make the embeddings with it.
        for side, size in (("source", vocabularies.source), ("target", vocabularies.target)):
            if pad is not None and pad >= size and not fields.problems:
                fields.problems.append(
                    f"pad_token_id {pad} is outside the {side} vocabulary of {size} (0 to {size - 1}); correct or "
                    "remove it"
                )
        if isinstance(self.positions, LearnedPositions) or self.positions.padding is None:
            return None
        if pad is None:
            fields.problems.append("pad_token_id is missing; positions are numbered by it")
            return None
        return UnnumberedPadding(pad, self.positions.padding)


def _check_start(spec: TransformerSpec, tokens: SpecialTokenIds) -> None:
    """Where padding is not numbered, transformers number a target by whether they compute it at once or not."""
    padding = spec.unnumbered_padding
    if padding is not None and tokens.decoder_start == padding.token:
        raise ExportError(
            f"decoder_start_token_id {tokens.decoder_start} is the pad_token_id, which {spec.architecture} does not "
            "number; correct one of them"
        )
