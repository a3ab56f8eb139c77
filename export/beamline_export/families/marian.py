"""MarianMT / OPUS-MT checkpoints (Hugging Face `MarianMTModel`): post-norm, sinusoidal positions, tied embeddings."""

from beamline_export.checkpoint import Fields
from beamline_export.families.bart_like import BartLike, Folder, SinusoidalPositions, Vocabularies
from beamline_export.families.bart_like_weights import Ties
from beamline_export.families.positions import sinusoidal_positions
from beamline_export.spec import ExportError, TransformerSpec
from beamline_export.tokenizer_config import read_tokenizer_config
from beamline_export.tokenizer_files import TokenizerFiles, read_marian_tokenizer, without_tokenizer


def _vocabularies(fields: Fields) -> Vocabularies:
    ties = Ties(
        head=fields.flag("tie_word_embeddings", True), sides=fields.flag("share_encoder_decoder_embeddings", True)
    )
    source = fields.integer("vocab_size", least=2)
    return Vocabularies(source, source if ties.sides else fields.integer("decoder_vocab_size", source, least=2), ties)


def _tokenizer(folder: Folder) -> TokenizerFiles:
    wanted = ["source.spm", "target.spm", "vocab.json"]
    if not any((folder.path / name).exists() for name in wanted):
        return without_tokenizer(folder.tokens)
    config = read_tokenizer_config(folder.path, "marian")
    # The tokenizer's own word counts; a model may have two tables for one vocabulary.
    if config.flags.get("separate_vocabs", not folder.one_vocabulary):
        wanted.append("target_vocab.json")
    if missing := [name for name in wanted if not (folder.path / name).exists()]:
        why = _why_separate(folder.spec, told="separate_vocabs" in config.flags) if missing == wanted[3:] else ""
        raise ExportError(
            f"{folder.path} lacks {', '.join(missing)} of its tokenizer{why}; copy all of {', '.join(wanted)} or none"
        )
    return read_marian_tokenizer(folder.path, {name: name for name in wanted}, config, folder.tokens)


def _why_separate(spec: TransformerSpec, *, told: bool) -> str:
    if told:
        return ", whose separate_vocabs is true"
    return (
        f" (share_encoder_decoder_embeddings is false: {spec.source_vocabulary} source and {spec.target_vocabulary} "
        "target tokens; if vocab.json is for both sides, say separate_vocabs: false in tokenizer_config.json)"
    )


MARIAN = BartLike(
    model_type="marian",
    model_class="MarianMTModel",
    positions=SinusoidalPositions(sinusoidal_positions, slow=True),
    vocabularies=_vocabularies,
    tokenizer=_tokenizer,
)
