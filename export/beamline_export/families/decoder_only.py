"""What Hugging Face's families of decoders without an encoder share: one description of a family, one way to read it.

The prompt that such a model continues is what others have as a source.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from beamline_export.checkpoint import Fields, read_json, read_optional_json, read_state_dict
from beamline_export.families.hugging_face import put_together
from beamline_export.families.rotary import Rotary
from beamline_export.generation import read_generation
from beamline_export.known_settings import CONFIG, contradictions, without_effect
from beamline_export.reference import HuggingFaceReference, PromptedReference, Reference, quiet_transformers
from beamline_export.renamer import Renamer
from beamline_export.spec import Activation, Array, Checkpoint, Norm, NormPlacement, SpecialTokenIds, TransformerSpec
from beamline_export.tokenizer_config import CONFIG_FILE, read_tokenizer_config
from beamline_export.tokenizer_files import TokenizerFiles, read_tokenizer_as_it_is, without_tokenizer
from beamline_export.tokenizer_json import find_tokenizer_json

MOST_PROMPTED = 8192
"""Positions that a bundle has at most: a server counts with the widest searches over all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """What a config says of the model, with what most families have.

    Attributes:
        positions: That the model can count up to.
        notices: What the user should know of them.
        head_size: Numbers of a head, where it is not width / heads.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    ffn: int
    positions: int
    activation: Activation
    norm_epsilon: float
    norm_placement: NormPlacement = NormPlacement.PRE
    final_norm: bool = True
    norm: Norm = Norm.LAYER
    gated: bool = False
    parallel_residual: bool = False
    key_value_heads: int | None = None
    head_size: int | None = None
    rotary: Rotary | None = None
    notices: tuple[str, ...] = ()

    def spec(self, architecture: str) -> TransformerSpec:
        """The architecture."""
        attention = None if self.head_size is None else self.heads * self.head_size
        positions = min(self.positions, MOST_PROMPTED)
        return TransformerSpec(
            architecture=architecture,
            d_model=self.width,
            encoder_layers=0,
            decoder_layers=self.layers,
            encoder_heads=0,
            decoder_heads=self.heads,
            encoder_ffn=0,
            decoder_ffn=self.ffn,
            norm_placement=self.norm_placement,
            activation=self.activation,
            source_vocabulary=self.vocabulary,
            target_vocabulary=self.vocabulary,
            max_source_positions=positions - 1,
            max_target_positions=positions,
            decoder_final_norm=self.final_norm,
            norm_epsilon=self.norm_epsilon,
            norm=self.norm,
            gated=self.gated,
            attention_width=None if attention == self.width else attention,
            parallel_residual=self.parallel_residual,
            key_value_heads=None if self.key_value_heads == self.heads else self.key_value_heads,
            rotary=None if self.rotary is None else self.rotary.spec,
        )

    def told(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.positions <= MOST_PROMPTED:
            return self.notices
        limit = (
            f"the model counts up to {self.positions} positions, a bundle up to {MOST_PROMPTED}: prompts and what "
            "follows them have as many tokens together"
        )
        return (*self.notices, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOnly:
    """A family.

    Attributes:
        model_type: Its name in config.json.
        model_class: Its class in transformers.
        base: What the names of tensors begin with, but for the head's, unless the model within was saved alone.
        embedding: Name of the token embedding.
        heads: Names of the head.
        sizes: Reads the config.
        take: Takes the weights of the layers, given the architecture, and what config.json says.
        ignored: Tensors that carry nothing, as a regular expression.
        aliases: Other names of config.json's fields.
        defaults: What the family's config class takes for what config.json does not say, where it changes answers.
        fixed: Settings of which one value alone is supported.
    """

    model_type: str
    model_class: str
    base: str
    embedding: str
    heads: tuple[str, ...] = ("lm_head.weight",)
    sizes: Callable[[Fields], DecoderSizes]
    take: Callable[[Renamer, TransformerSpec, Mapping[str, Any]], None]
    ignored: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)

    def read(self, folder: Path) -> Checkpoint:
        """Read a folder of this family.

        Raises:
            ExportError: config, weights or tokenizer files are missing or contradict each other.
        """
        given = read_json(folder / "config.json")
        # As transformers, which know a field by either name.
        named = {name: given[alias] for alias, name in self.aliases.items() if given.get(alias) is not None}
        config = {**self.defaults, **named, **{name: value for name, value in given.items() if value is not None}}
        fields = Fields(config, "config.json")
        for name, value in {"is_encoder_decoder": False, **self.fixed}.items():
            fields.must_be(name, value)
        sizes, tied = self.sizes(fields), fields.flag("tie_word_embeddings", True)
        fields.problems += contradictions(given, self.aliases)
        fields.check()
        spec = sizes.spec(self.model_type)
        generation = read_generation(
            config,
            read_optional_json(folder / "generation_config.json"),
            max_positions=spec.max_target_positions - 1,
            decoder_only=True,
        )
        tokenizer = _tokenizer(folder, generation.tokens)
        names = self._renamed(folder, spec, config, tied=tied)
        if sizes.rotary is not None:
            names.weights |= sizes.rotary.tables(spec.max_target_positions)
        ignored = without_effect(config, CONFIG[self.model_type], name_unknown=False)
        return put_together(spec, names, generation, tokenizer, ignored, sizes.told())

    def reference(self, folder: Path, checkpoint: Checkpoint) -> Reference:
        """The model as transformers runs it."""
        loaded = HuggingFaceReference(self.model_class, folder)
        return PromptedReference(loaded.model, checkpoint.removed_tokens)

    def _renamed(self, folder: Path, spec: TransformerSpec, config: Mapping[str, Any], *, tied: bool) -> Renamer:
        names = with_base(read_state_dict(folder), self.base, self.heads)
        names.ignore(self.ignored)
        take_ends(names, self.embedding, self.heads, tied=tied)
        self.take(names, spec, config)
        table = names.weights.get("target_positions")
        if spec.max_target_positions == MOST_PROMPTED and table is not None:
            names.weights["target_positions"] = table[:MOST_PROMPTED]
        if "head.weight" in names.weights:
            names.weights["head.bias"] = np.zeros(len(names.weights["head.weight"]), np.float32)
        return names


def with_base(state: Mapping[str, Array], base: str, heads: tuple[str, ...]) -> Renamer:
    """Tensors by the names of the whole model, whether it or the model within was saved."""
    if any(name.startswith(base) for name in state):
        return Renamer(state)
    whole = {name: name if name in heads else f"{base}{name}" for name in state}
    return Renamer({whole[name]: array for name, array in state.items()}, {new: name for name, new in whole.items()})


def take_ends(names: Renamer, embedding: str, heads: tuple[str, ...], *, tied: bool) -> None:
    """The token embedding and the head, which is the same table where they are tied."""
    names.take("target_embedding", embedding)
    names.take("head.weight", *heads, *([embedding] if tied else []))
    names.share_equal("target_embedding", "head.weight")
    if tied:
        names.tell_untied("tie_word_embeddings is true", "target_embedding", "head.weight")


def _tokenizer(folder: Path, tokens: SpecialTokenIds) -> TokenizerFiles:
    config = read_tokenizer_config(folder, "decoder_only")
    found = find_tokenizer_json(folder)
    if found is None:
        return without_tokenizer(tokens, ends_sources=False)
    # Whatever class it names: what that reads otherwise is told by comparison.
    classes = [] if config.tokenizer_class is None else [config.tokenizer_class.removesuffix("Fast")]
    files = read_tokenizer_as_it_is(folder, found, config, tokens, classes=classes, target_begins=None)
    return dataclasses.replace(files, notices=(*files.notices, *_read_otherwise(folder, found.tokenizer)))


def _read_otherwise(folder: Path, tokenizer: Any) -> Iterator[str]:
    """What the user should know if transformers read texts otherwise: some classes make parts of a tokenizer anew."""
    import transformers

    try:
        with quiet_transformers():
            theirs: Any = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            read = [(text, theirs(text, split_special_tokens=True).input_ids) for text in _TEXTS]
    except Exception as error:  # transformers raise many kinds; the file is read all the same
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        yield f"transformers cannot load the tokenizer to compare it with ({reason}); tokenizer.json is read as it is"
        return
    different = [text for text, ids in read if ids != tokenizer.encode(text).ids]
    if different:
        yield (
            f"tokenizer.json is read as it is; transformers' {type(theirs).__name__} reads texts such as "
            f"{different[0]!r} otherwise: name PreTrainedTokenizerFast as tokenizer_class in {CONFIG_FILE} if the "
            "model learned with the file, or save the tokenizer again"
        )


_TEXTS = (
    "The cat sat on the mat.", " leading space", "two  spaces\tand a tab", "new\nlines\n\nhere", "UPPER and lower",
    "ÀÉÎõü caf\u0065\u0301", "it's don't we'll", "12345 3.14", "日本語 and русский", "🙂 emoji",
    "(brackets) [and] {more}!", "",
)  # fmt: skip
"""Where tokenizers differ, if they do."""
