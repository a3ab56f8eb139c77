"""The config.json of the family nn_transformer: every key that it may have, and what each means."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beamline_export.checkpoint import MOST_LAYERS, MOST_POSITIONS, Fields
from beamline_export.families.nn_layouts import LAYOUTS, Layout, folded_epsilon
from beamline_export.families.search_settings import read_settings
from beamline_export.generation import Generation, read_generation
from beamline_export.spec import Activation, ExportError, NormPlacement, TransformerSpec
from beamline_export.state_names import Translation

_ACTIVATIONS = {"relu": Activation.RELU, "gelu": Activation.GELU, "gelu_tanh": Activation.GELU_TANH}
_LEARNED = {"sinusoidal": False, "learned": True}
_FINAL_NORMS = {"true": (True, True), "false": (False, False), '"encoder"': (True, False), '"decoder"': (False, True)}

_TABLES = ("target_embedding", "head.weight", "source_embedding")
TIES = {"false": (), "true": _TABLES[:2], '"all"': _TABLES}
"""The JSON text of `tie_embeddings` -> the tables that are one then."""

OTHER_NAMES = {
    **dict.fromkeys(("num_heads", "n_heads", "n_head", "num_attention_heads"), "nhead"),
    **dict.fromkeys(("hidden_size", "embed_dim", "emb_size"), "d_model"),
    **dict.fromkeys(("ffn_dim", "ffn_hid_dim", "dim_ff", "d_ff", "intermediate_size"), "dim_feedforward"),
    **dict.fromkeys(("num_layers", "n_layers", "num_hidden_layers"), "num_encoder_layers and num_decoder_layers"),
    "vocab_size": "source_vocab_size and target_vocab_size",
}
"""What other configs call keys of this one, if the two names are not alike."""

_NEUTRAL = {
    "model_type",  # has chosen the family
    "architectures", "transformers_version", "torch_dtype", "dtype",  # written by transformers for itself
    "dropout",  # acts in training only
    "batch_first", "bias",  # arguments of nn.Transformer that change no weights, or that the weights show themselves
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """What config.json says.

    Attributes:
        spec: The architecture.
        layout: What tensors are called.
        norm_epsilon: As the model has it; the spec has what the graphs need.
        learned_positions: Whether position tables are read rather than computed.
        tied: Canonical names of the tables that are one; one that the file lacks is the first of these that it has.
        source_bos: What stands before each source, if anything.
        source_eos: What stands after each source, if anything.
        names: Names in the file -> names of the layout.
        generation: Search settings and special tokens.
    """

    spec: TransformerSpec
    layout: Layout
    norm_epsilon: float
    learned_positions: bool
    tied: tuple[str, ...]
    source_bos: int | None
    source_eos: int | None
    names: Translation
    generation: Generation

    def tables(self) -> dict[str, tuple[str, ...]]:
        """Canonical name of each table of tokens -> names in the layout, the first of which that exists holds it."""
        own = {
            "source_embedding": self.layout.source_embedding,
            "target_embedding": self.layout.target_embedding,
            "head.weight": f"{self.layout.generator}.weight",
        }
        # Of tied weights, some ways of saving keep only one.
        others = {table: self.tied if table in self.tied else () for table in own}
        return {table: (name, *(own[o] for o in others[table] if o != table)) for table, name in own.items()}


def read_config(data: Mapping[str, Any]) -> Config:
    """Read what config.json says.

    Raises:
        ExportError: values that make no sense, and keys that are not known, all at once.
    """
    fields = Fields(data, "config.json")
    layout: Layout = fields.choice("layout", LAYOUTS, "beamline")
    epsilon = fields.number("layer_norm_eps", layout.norm_epsilon, least=0)
    spec = _read_spec(fields, layout, epsilon)
    learned, tied = fields.choice("positions", _LEARNED, "sinusoidal"), _read_ties(fields, spec)
    bos, eos = fields.optional_id("source_bos_token_id"), fields.optional_id("source_eos_token_id")
    names, settings = _read_names(fields), read_settings(fields, data, _NEUTRAL, OTHER_NAMES)
    try:
        generation = read_generation(settings, None, max_positions=spec.max_target_positions, needs_eos=False)
    except ExportError as error:
        raise ExportError("; ".join([str(error), *fields.problems])) from error
    fields.check()
    return Config(spec, layout, epsilon, learned, tied, bos, eos, names, generation)


def _read_spec(fields: Fields, layout: Layout, epsilon: float) -> TransformerSpec:
    d_model, heads, ffn = fields.integer("d_model"), fields.integer("nhead"), fields.integer("dim_feedforward")
    positions = fields.integer("max_positions", most=MOST_POSITIONS)
    encoder_norm, decoder_norm = fields.json_choice("final_norm", _FINAL_NORMS, "true")
    for name, value in layout.fixed.items():
        fields.must_be(name, value)
    pre_norm = fields.flag("norm_first", layout.fixed.get("norm_first") is True)
    return TransformerSpec(
        architecture="nn_transformer",
        d_model=d_model,
        encoder_layers=fields.integer("num_encoder_layers", most=MOST_LAYERS),
        decoder_layers=fields.integer("num_decoder_layers", most=MOST_LAYERS),
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_ffn=ffn,
        decoder_ffn=ffn,
        norm_placement=NormPlacement.PRE if pre_norm else NormPlacement.POST,
        activation=fields.choice("activation", _ACTIVATIONS, "relu"),
        source_vocabulary=fields.integer("source_vocab_size"),
        target_vocabulary=fields.integer("target_vocab_size", least=2),
        max_source_positions=positions,
        max_target_positions=positions,
        embedding_scale=math.sqrt(d_model) if fields.flag("scale_embedding", True) else 1.0,
        encoder_final_norm=encoder_norm,
        decoder_final_norm=decoder_norm,
        norm_epsilon=folded_epsilon(epsilon, d_model) if layout.unbiased_norms else epsilon,
    )


def _read_ties(fields: Fields, spec: TransformerSpec) -> tuple[str, ...]:
    tied: tuple[str, ...] = fields.json_choice("tie_embeddings", TIES, "false")
    source, target = spec.source_vocabulary, spec.target_vocabulary
    # A size that is wrong by itself has been told.
    if tied == _TABLES and source != target and not fields.problems:
        sizes = f"source_vocab_size is {source} and target_vocab_size is {target}"
        fields.problems.append(
            f'tie_embeddings is "all", but {sizes}; one table has one size: correct one of the three'
        )
    return tied


def _read_names(fields: Fields) -> Translation:
    names = fields.mapping("names")
    for name, new in names.items():
        if new is not None and not isinstance(new, str):
            fields.problems.append(f"names: {name!r} must become a name, or null, which leaves it out")
        elif new is not None and name.endswith(".") != (not new or new.endswith(".")):
            fields.problems.append(f"names: {name!r} becomes {new!r}; both must end with a dot, or neither")
    return {name: new for name, new in names.items() if new is None or isinstance(new, str)}
