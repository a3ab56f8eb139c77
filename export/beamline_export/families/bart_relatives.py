"""Relatives of BART in Hugging Face's implementation, a row each."""

from collections.abc import Callable

from beamline_export.checkpoint import Fields
from beamline_export.families.bart_like import BartLike, Folder, LearnedPositions, SinusoidalPositions, Vocabularies
from beamline_export.families.bart_like_weights import HEAD, SHARED, SOURCE, TARGET, Tables, Ties
from beamline_export.families.blenderbot_small_tokenizer import read_blenderbot_small_tokenizer
from beamline_export.families.fsmt_tokenizer import read_fsmt_tokenizer
from beamline_export.families.m2m_100_tokenizer import MODEL_FILE, VOCABULARY_FILE, read_m2m_100_tokenizer
from beamline_export.families.plbart_tokenizer import read_plbart_tokenizer
from beamline_export.families.positions import sinusoidal_positions, stretched_positions
from beamline_export.languages import SourceMarked, TargetBegins
from beamline_export.sentencepiece_files import tokenizer_json_of_pieces
from beamline_export.spec import ExportError, NormPlacement, PaddingInTarget
from beamline_export.tokenizer_config import read_tokenizer_config, tokenizer_class
from beamline_export.tokenizer_files import (
    ROBERTA_CLASSES,
    TokenizerFiles,
    read_bart_tokenizer,
    read_tokenizer_as_it_is,
    without_tokenizer,
)
from beamline_export.tokenizer_json import TokenizerJson, find_tokenizer_json

_FAIRSEQ_MODEL = "sentencepiece.bpe.model"
_NLLB_CLASS = "NllbTokenizer"


def _tokenizer_json(
    *classes: str,
    model: str | None = None,
    check: Callable[[TokenizerJson], None] = lambda _: None,
    before: TargetBegins = "none",
    after: TargetBegins = "none",
) -> Callable[[Folder], TokenizerFiles]:
    """Reads a tokenizer.json, or else a SentencePiece `model`, if there is one, as these classes of transformers do.

    `check` looks at what was made of a model. `before` and `after` are how a target begins with its language where a
    source has the code of its own there.
    """
    begins: dict[SourceMarked, TargetBegins] = {"source_before": before, "source_after": after}
    target_begins = {marked: begin for marked, begin in begins.items() if begin != "none"}

    def read(folder: Folder) -> TokenizerFiles:
        config = read_tokenizer_config(folder.path, "bart_relatives")
        found = find_tokenizer_json(folder.path)
        if found is None and model is not None and (folder.path / model).exists():
            named = config.tokenizer_class or tokenizer_class(folder.config, "config.json")
            found = tokenizer_json_of_pieces(folder.path, model, named or classes[0], classes)
            check(found)
        if found is None:
            return without_tokenizer(folder.tokens)
        if config.tokenizer_class is not None and config.tokenizer_class.removesuffix("Fast") in ROBERTA_CLASSES:
            return read_bart_tokenizer(found, config, folder.tokens)
        return read_tokenizer_as_it_is(
            folder.path, found, config, folder.tokens, classes=classes, target_begins=target_begins
        )

    return read


def _check_order_of_codes(found: TokenizerJson) -> None:
    """Behind NLLB's pieces stand the codes, and <mask> behind them; transformers 5 may put it first.

    Raises:
        ExportError: they do so.
    """
    pieces = found.tokenizer.get_vocab_size(with_added_tokens=False)
    if found.tokenizer.id_to_token(pieces) in (None, "<mask>"):
        raise ExportError(
            f"{MODEL_FILE} alone has no language codes, and transformers 5 give them other ids than NLLB was trained "
            "with; copy its tokenizer.json, or a tokenizer_config.json whose added_tokens_decoder has their ids"
        )


_NLLB = _tokenizer_json(
    _NLLB_CLASS, model=MODEL_FILE, check=_check_order_of_codes, before="forced_first", after="forced_first"
)


def _m2m_100_or_nllb(folder: Folder) -> TokenizerFiles:
    """NLLB is an M2M100 with another tokenizer."""
    own = any((folder.path / name).exists() for name in (MODEL_FILE, VOCABULARY_FILE))
    if own and not (folder.path / "tokenizer.json").exists() and not _is_nllb(folder):
        return read_m2m_100_tokenizer(folder)
    return _NLLB(folder)


def _is_nllb(folder: Folder) -> bool:
    """Whether the tokenizer's class is NLLB's, whose SentencePiece model stands alone."""
    named = read_tokenizer_config(folder.path, "bart_relatives").tokenizer_class
    return (named or tokenizer_class(folder.config, "config.json") or "").removesuffix("Fast") == _NLLB_CLASS


def _two_vocabularies(fields: Fields) -> Vocabularies:
    """FSMT's: source and target each have their own."""
    source, target = (fields.integer(name, least=2) for name in ("src_vocab_size", "tgt_vocab_size"))
    tied = fields.flag("tie_word_embeddings", False)
    if fields.raw("vocab_size") not in (None, target):
        fields.problems.append("vocab_size is tgt_vocab_size under another name, with another value; remove it")
    if tied and source != target and not fields.problems:
        fields.problems.append(
            f"tie_word_embeddings is true, but src_vocab_size {source} and tgt_vocab_size {target} differ; correct one"
        )
    return Vocabularies(source, target, Ties(head=tied, sides=tied))


_FAIRSEQ_IDS: dict[str, object] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_PARLAI_IDS: dict[str, object] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

_SOURCE_FIRST = Tables(tied=(SHARED, HEAD, SOURCE, TARGET))
_FSMT_HEAD = "model.decoder.output_projection.weight"

MBART = BartLike(
    model_type="mbart",
    model_class="MBartForConditionalGeneration",
    positions=LearnedPositions(2),
    norm_placement=NormPlacement.PRE,
    embedding_norm=True,
    final_norms=True,
    tokenizer=_tokenizer_json(
        "MBartTokenizer", "MBart50Tokenizer", model=_FAIRSEQ_MODEL, before="forced_first", after="decoder_start"
    ),
    defaults={**_FAIRSEQ_IDS, "forced_eos_token_id": 2},
)

M2M_100 = BartLike(
    model_type="m2m_100",
    model_class="M2M100ForConditionalGeneration",
    positions=SinusoidalPositions(stretched_positions, PaddingInTarget.NOWHERE),
    norm_placement=NormPlacement.PRE,
    final_norms=True,
    head_bias=False,
    tokenizer=_m2m_100_or_nllb,
    defaults={
        **_FAIRSEQ_IDS,
        "decoder_start_token_id": 2,
        "scale_embedding": True,
        "activation_function": "relu",
    },
)

PEGASUS = BartLike(
    model_type="pegasus",
    model_class="PegasusForConditionalGeneration",
    positions=SinusoidalPositions(sinusoidal_positions, slow=True),
    norm_placement=NormPlacement.PRE,
    final_norms=True,
    tokenizer=_tokenizer_json("PegasusTokenizer", model="spiece.model"),
    defaults={"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1},
)

BLENDERBOT = BartLike(
    model_type="blenderbot",
    model_class="BlenderbotForConditionalGeneration",
    positions=LearnedPositions(0),
    norm_placement=NormPlacement.PRE,
    final_norms=True,
    tables=_SOURCE_FIRST,
    tokenizer=_tokenizer_json("BlenderbotTokenizer"),
    defaults={**_PARLAI_IDS, "forced_eos_token_id": 2, "encoder_no_repeat_ngram_size": 3},
)

BLENDERBOT_SMALL = BartLike(
    model_type="blenderbot-small",
    model_class="BlenderbotSmallForConditionalGeneration",
    positions=LearnedPositions(0),
    embedding_norm=True,
    target_norm_before_positions=True,
    tables=_SOURCE_FIRST,
    tokenizer=read_blenderbot_small_tokenizer,
    defaults={**_PARLAI_IDS, "forced_eos_token_id": 2},
)

PLBART = BartLike(
    model_type="plbart",
    model_class="PLBartForConditionalGeneration",
    positions=LearnedPositions(2),
    embedding_norm=True,
    tables=_SOURCE_FIRST,
    tokenizer=read_plbart_tokenizer,
    defaults={**_FAIRSEQ_IDS, "forced_eos_token_id": 2, "scale_embedding": True},
)

MVP = BartLike(
    model_type="mvp",
    model_class="MvpForConditionalGeneration",
    positions=LearnedPositions(2),
    embedding_norm=True,
    tables=_SOURCE_FIRST,
    tokenizer=_tokenizer_json("MvpTokenizer"),
    defaults={**_FAIRSEQ_IDS, "decoder_start_token_id": 2},
    fixed={"use_prompt": False},
)

FSMT = BartLike(
    model_type="fsmt",
    model_class="FSMTForConditionalGeneration",
    positions=SinusoidalPositions(stretched_positions, PaddingInTarget.WITH_PREVIOUS),
    tables=Tables(_FSMT_HEAD, (TARGET, SOURCE, _FSMT_HEAD)),
    head_bias=False,
    vocabularies=_two_vocabularies,
    tokenizer=read_fsmt_tokenizer,
    defaults={
        **_FAIRSEQ_IDS,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
        "scale_embedding": True,
        "activation_function": "relu",
        "num_beams": 5,
        "max_length": 200,
    },
)

ROWS = (MBART, M2M_100, PEGASUS, BLENDERBOT, BLENDERBOT_SMALL, PLBART, MVP, FSMT)
"""All of them."""
