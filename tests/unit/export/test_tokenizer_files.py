"""What a folder's tokenizer files say: what stands around a source, what leaves no trace, what has no effect."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from beamline_export.families.registry import detect
from beamline_export.spec import Checkpoint, ExportError
from beamline_export.testing import nn_config, write_hugging_face, write_nn_transformer
from beamline_export.vocabularies import check_vocabularies

FR_EN = Path(__file__).parents[3] / "models" / "fr-en"
MARIAN_FILES = ("source.spm", "target.spm", "vocab.json")
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "c", "[CLS]", "[SEP]"]
LOWERCASE = tokenizers.normalizers.Lowercase()
METASPACE = tokenizers.pre_tokenizers.Metaspace()
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def edit(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**data, **changes}))


def write_marian(folder: Path, tokenizer_config: dict[str, Any] | None = None, **config: Any) -> Path:
    """A random model with the tokenizer of the embedded one, and no settings for it but these."""
    ids = {"eos_token_id": 0, "pad_token_id": 5999, "decoder_start_token_id": 5999, "bos_token_id": None}
    write_hugging_face(folder, "marian", {"vocab_size": 6000, **ids, **config}, ids)
    for name in MARIAN_FILES:
        shutil.copy(FR_EN / name, folder)
    if tokenizer_config is not None:
        edit(folder / "tokenizer_config.json", **tokenizer_config)
    return folder


def shift_target(folder: Path, by: int = 7, size: int = 6000) -> dict[str, int]:
    """Write a vocabulary of its own for the target."""
    vocabulary = json.loads((FR_EN / "vocab.json").read_text())
    shifted = {piece: (i + by) % size for piece, i in list(vocabulary.items())[:size]}
    (folder / "target_vocab.json").write_text(json.dumps(shifted))
    return shifted


def write_bart(
    folder: Path,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    around: Sequence[str] = ("<s>", "</s>"),
    added: Sequence[Any] = (),
    words: Sequence[str] = WORDS,
    vocabulary: int = len(WORDS),
) -> Path:
    """A random model with a tokenizer of a few words."""
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    write_hugging_face(folder, "bart", {"vocab_size": vocabulary, **ids}, ids)
    (folder / "tokenizer.json").write_text(word_tokenizer(words, around, added).to_str())
    if tokenizer_config is not None:
        edit(folder / "tokenizer_config.json", **tokenizer_config)
    return folder


def word_tokenizer(words: Sequence[str], around: Sequence[str], added: Sequence[Any] = ()) -> tokenizers.Tokenizer:
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token=words[3]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(list(added))
    if around:
        template = f"{around[0]} $A {' '.join(around[1:])}"
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[(token, numbers[token]) for token in around]
        )
    return tokenizer


def read(folder: Path) -> Checkpoint:
    return detect(folder).read(folder)


def ignored(checkpoint: Checkpoint) -> dict[str, str]:
    found = checkpoint.generation["not_supported"]
    assert isinstance(found, dict)
    return found


def test_marians_source_ends_as_its_tokenizer_says(tmp_path: Path) -> None:
    """In the source vocabulary, whatever ids end an output."""
    folder = write_marian(tmp_path / "m", share_encoder_decoder_embeddings=False, decoder_vocab_size=6000)
    target = shift_target(folder)
    edit(folder / "generation_config.json", eos_token_id=[2, target["</s>"]])
    tokens = read(folder).special_tokens
    assert (tokens.source_bos, tokens.source_eos, tokens.eos) == (None, 0, (2, 7))
    edit(folder / "tokenizer_config.json", eos_token="%")
    assert read(folder).special_tokens.source_eos == json.loads((folder / "vocab.json").read_text())["%"]


def test_an_end_that_the_vocabulary_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = write_marian(tmp_path / "m", {"eos_token": "<end>"})
    with pytest.raises(ExportError, match=r"vocab\.json has no '<end>'; copy the vocabulary of this model"):
        read(folder)


@pytest.mark.parametrize(("eos", "expected"), [([5999, 0], 0), ([0, 5999], 0), (7, 7), ([5999], 5999)])
def test_without_a_tokenizer_sources_end_with_what_ends_an_output(eos: Any, expected: int, tmp_path: Path) -> None:
    """But not with padding."""
    folder = write_marian(tmp_path / "m")
    for name in MARIAN_FILES:
        (folder / name).unlink()
    edit(folder / "generation_config.json", eos_token_id=eos)
    assert read(folder).special_tokens.source_eos == expected


def test_separate_vocabularies_need_two_files(tmp_path: Path) -> None:
    folder = write_marian(tmp_path / "m", share_encoder_decoder_embeddings=False, decoder_vocab_size=90, pad_token_id=0)
    with pytest.raises(
        ExportError, match=r"lacks target_vocab\.json .*6000 source and 90 target tokens; if vocab\.json"
    ):
        read(folder)
    edit(folder / "tokenizer_config.json", separate_vocabs=True)
    with pytest.raises(ExportError, match=r"lacks target_vocab\.json of its tokenizer, whose separate_vocabs is true"):
        read(folder)
    edit(folder / "tokenizer_config.json", separate_vocabs=False)
    edit(folder / "generation_config.json", pad_token_id=0, decoder_start_token_id=0)
    assert "target_vocab.json" not in read(folder).tokenizer_files
    with pytest.raises(ExportError, match=r"vocab\.json has 6000 tokens .* model's target vocabulary has 90: copy the"):
        check_vocabularies(read(folder), folder)


def test_the_tokenizer_says_whether_vocabularies_are_separate(tmp_path: Path) -> None:
    """Embeddings may be two tables for one vocabulary, or one table for two."""
    folder = write_marian(tmp_path / "m", {"separate_vocabs": True})
    shift_target(folder)
    assert "target_vocab.json" in read(folder).tokenizer_files
    edit(folder / "tokenizer_config.json", separate_vocabs=False)
    assert "target_vocab.json" not in read(folder).tokenizer_files


@pytest.mark.parametrize(
    ("around", "config", "bos", "eos", "notice"),
    [
        pytest.param(("<s>", "</s>"), None, 0, 2, None, id="as-bart"),
        pytest.param(("[CLS]", "[SEP]"), PLAIN, 7, 8, None, id="cls-and-sep"),
        pytest.param(
            ("[CLS]", "[SEP]"), {}, 7, 8, r"\[CLS\] and \[SEP\] .*BartTokenizer puts <s> and </s>", id="other"
        ),
        pytest.param(
            ("[CLS]", "[SEP]"), {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}}, 7, 8, None, id="named"
        ),
        pytest.param((), PLAIN, None, None, "no post-processor .*; a text stands alone", id="nothing"),
        pytest.param((), {}, 0, 2, "no post-processor .*; <s> and </s> are added", id="nothing-in-the-file"),
        pytest.param((), {"cls_token": "[CLS]"}, 7, 2, r"; \[CLS\] and </s> are added", id="nothing-but-named"),
    ],
)
def test_barts_source_stands_between_what_its_tokenizer_adds(
    around: tuple[str, ...],
    config: dict[str, Any] | None,
    bos: int | None,
    eos: int | None,
    notice: str | None,
    tmp_path: Path,
) -> None:
    checkpoint = read(write_bart(tmp_path / "b", config, around=around))
    assert (checkpoint.special_tokens.source_bos, checkpoint.special_tokens.source_eos) == (bos, eos)
    notices = [told for told in checkpoint.notices if "byte pairs" not in told]
    if notice is None:
        assert notices == []
    else:
        [told] = notices
        assert re.search(notice, told)


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        pytest.param(lambda tokenizer: None, None, False, id="byte-level"),
        pytest.param(lambda tokenizer: setattr(tokenizer, "normalizer", LOWERCASE), None, True, id="lowercase"),
        pytest.param(lambda tokenizer: setattr(tokenizer, "normalizer", LOWERCASE), PLAIN, False, id="named-class"),
        pytest.param(lambda tokenizer: setattr(tokenizer, "pre_tokenizer", METASPACE), {}, True, id="metaspace"),
    ],
)
def test_what_barts_own_class_would_read_otherwise_is_told(
    change: Callable[[Any], None], config: dict[str, Any] | None, told: bool, tmp_path: Path
) -> None:
    folder = write_bart(tmp_path / "b", config)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    change(tokenizer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    assert any("would make byte pairs of it" in notice for notice in read(folder).notices) == told


def test_a_bart_without_what_stands_around_a_text_is_refused(tmp_path: Path) -> None:
    folder = write_bart(tmp_path / "b", {"cls_token": "<begin>"}, around=())
    with pytest.raises(ExportError, match=r"tokenizer\.json has no <begin>, which BART has around a text; add it"):
        read(folder)


def test_what_leaves_no_trace_is_told_where_it_is_not_what_servers_take_it_for(tmp_path: Path) -> None:
    assert read(write_marian(tmp_path / "m")).tokenizer_settings == {}
    flagged = [tokenizers.AddedToken(word, special=True) for word in WORDS[:4]]
    assert read(write_bart(tmp_path / "b", added=flagged)).tokenizer_settings == {}
    edit(tmp_path / "m" / "generation_config.json", eos_token_id=[0, 2])
    edit(tmp_path / "b" / "tokenizer_config.json", extra_special_tokens=["b"], mask_token="c")
    assert read(tmp_path / "m").tokenizer_settings == {"special": [0, 1, 5999]}
    assert read(tmp_path / "b").tokenizer_settings == {"special": [0, 1, 2, 3, 5, 6]}


def test_the_map_of_special_tokens_counts_for_old_tokenizers_alone(tmp_path: Path) -> None:
    folder = write_marian(tmp_path / "m", {"eos_token": "%"})
    edit(folder / "special_tokens_map.json", eos_token={"content": ";"})
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert read(folder).special_tokens.source_eos == vocabulary[";"]
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"0": {"content": "</s>", "special": True}})
    assert read(folder).special_tokens.source_eos == vocabulary["%"]


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ({"do_lower_case": True}, "do_lower_case", "true"),
        ({"truncation_side": "left"}, "truncation_side", '"left"'),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs", '{"enable_sampling": true}'),
        ({"unk_token": "[UNK]"}, "unk_token", '"[UNK]"; <unk> is used'),
        ({"tokenizer_class": "T5Tokenizer"}, "tokenizer_class", '"T5Tokenizer"; read as by MarianTokenizer'),
        ({"clean_up_spaces": True}, "clean_up_spaces", "true (an unknown name)"),
        ({"language_token": 3}, "language_token", "3 (an unknown name)"),
        (
            {"added_tokens_decoder": {"6000": {"content": "<new>", "special": False}}},
            "added_tokens_decoder",
            '["<new>"]: read as any other text',
        ),
    ],
)
def test_a_tokenizers_settings_without_effect_are_named(
    config: dict[str, Any], name: str, value: str, tmp_path: Path
) -> None:
    assert ignored(read(write_marian(tmp_path / "m", config))) == {f"tokenizer_config.json: {name}": value}


@pytest.mark.parametrize(
    "config",
    [
        {"source_lang": "fra", "target_lang": "eng", "model_max_length": 256, "sp_model_kwargs": {}},
        {"split_special_tokens": True, "spaces_between_special_tokens": False, "do_lower_case": False},
        {"tokenizer_class": "MarianTokenizer", "unk_token": "<unk>", "image_token": "<image>"},
        {"add_bos_token": False, "add_eos_token": True},
        {"added_tokens_decoder": {"0": {"content": "</s>", "special": True}}, "extra_special_tokens": ["<eop>"]},
    ],
)
def test_settings_that_change_no_answer_are_not_named(config: dict[str, Any], tmp_path: Path) -> None:
    assert ignored(read(write_marian(tmp_path / "m", config))) == {}


def test_a_space_before_texts_is_as_tokenizer_json_has_it(tmp_path: Path) -> None:
    """And what BART's own class would make of the setting is named; no other class heeds it."""
    folder = write_bart(tmp_path / "b", {"add_prefix_space": True})
    assert ignored(read(folder)) == {}
    tokenizer = word_tokenizer(WORDS, ("<s>", "</s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    assert ignored(read(folder)) == {
        "tokenizer_config.json: add_prefix_space": "true; false is used, as in tokenizer.json"
    }
    edit(folder / "tokenizer_config.json", **PLAIN)
    assert ignored(read(folder)) == {}


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": 7},
        {"added_tokens_decoder": {"0": 1}},
        {"extra_special_tokens": [{"a": 1}]},
        {"extra_special_tokens": "abc"},
    ],
)
def test_tokens_that_are_none_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"tokenizer_config\.json holds tokens that are none"):
        read(write_marian(tmp_path / "m", config))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_the_class_of_a_tokenizer_is_a_name(file: str, tmp_path: Path) -> None:
    folder = write_bart(tmp_path / "b", {})
    edit(folder / file, tokenizer_class=["BartTokenizer"])
    with pytest.raises(ExportError, match=rf"{file}: tokenizer_class must be the name of a class, not \["):
        read(folder)


def test_flags_are_true_or_false(tmp_path: Path) -> None:
    folder = write_marian(tmp_path / "m", {"separate_vocabs": "yes", "clean_up_tokenization_spaces": 1})
    with pytest.raises(
        ExportError, match=r"separate_vocabs must be true or false.*clean_up_tokenization_spaces must be"
    ):
        read(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "vocab.json"])
def test_a_file_that_is_no_json_is_named(name: str, tmp_path: Path) -> None:
    folder = write_marian(tmp_path / "m")
    (folder / name).write_text("{")
    with pytest.raises(ExportError, match=f"{name} cannot be read"):
        read(folder)


def test_marians_vocabularies_are_compared_on_both_sides(tmp_path: Path) -> None:
    folder = write_marian(tmp_path / "m", share_encoder_decoder_embeddings=False, decoder_vocab_size=6000)
    shift_target(folder)
    assert check_vocabularies(read(folder), folder) == []
    shift_target(folder, 0, 50)
    [told] = check_vocabularies(read(folder), folder)
    assert (
        told == "target_vocab.json has tokens for 50 of the 6000 ids that the model may give; the others leave no text"
    )
    for file in ("vocab.json", "target_vocab.json"):
        shift_target(folder)
        shutil.copy(FR_EN / "vocab.json", folder)
        edit(folder / file, extra=6000)
        side = "target" if "target" in file else "source"
        problem = (
            rf"{file} has 6001 tokens with ids up to 6000, the model's {side} vocabulary has 6000: copy the tokenizer"
        )
        with pytest.raises(ExportError, match=problem):
            check_vocabularies(read(folder), folder)


def test_padded_embeddings_and_a_mask_without_one_are_legitimate(tmp_path: Path) -> None:
    """As BART's published models have them: <mask> among their tokenizer's words, and not among the model's."""
    mask = tokenizers.AddedToken("<mask>", special=True)
    folder = write_bart(tmp_path / "b", words=[*WORDS, "<mask>"], added=[mask])
    assert check_vocabularies(read(folder), folder) == [
        "tokenizer.json has tokens that the model does not have (<mask>): they are never read from a text"
    ]
    folder = write_bart(tmp_path / "padded", vocabulary=16)
    assert check_vocabularies(read(folder), folder) == [
        "tokenizer.json has tokens for 9 of the 16 ids that the model may give; the others leave no text"
    ]


def test_words_beside_a_vocabulary_are_unknown_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    folder = write_bart(tmp_path / "b", added=["new"])
    assert check_vocabularies(read(folder), folder) == [
        "tokenizer.json has tokens that the model does not have (new): they are read as unknown words"
    ]
    words = [word.replace("<unk>", "none") for word in WORDS]
    tokenizer = word_tokenizer(words, ("<s>", "</s>"), ["new"])
    tokenizer.model.unk_token = "?"
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    with pytest.raises(
        ExportError, match=r"tokenizer\.json has 10 tokens with ids up to 9, the model's source .* has 9"
    ):
        check_vocabularies(read(folder), folder)
    folder = write_bart(tmp_path / "foreign", words=[*WORDS, "d", "e"])
    with pytest.raises(
        ExportError, match=r"tokenizer\.json has 11 tokens with ids up to 10, the model's source .* has 9"
    ):
        check_vocabularies(read(folder), folder)


@pytest.fixture
def nn_folder(tmp_path: Path) -> Callable[..., Path]:
    """An nn.Transformer with vocabularies of 9 and 7 tokens."""

    def make(**config: Any) -> Path:
        sizes = {"source_vocab_size": 9, "target_vocab_size": 7}
        return write_nn_transformer(tmp_path / "nn", nn_config(**sizes, **config))

    return make


def test_an_nn_transformers_tokenizers_are_compared_on_both_sides(nn_folder: Callable[..., Path]) -> None:
    folder = nn_folder(source_eos_token_id=None)
    (folder / "tokenizer.json").write_text(word_tokenizer(WORDS, ()).to_str())
    with pytest.raises(ExportError, match=r"[/\\]tokenizer\.json has 9 tokens .*the model's target vocabulary has 7"):
        check_vocabularies(read(folder), folder)
    (folder / "target_tokenizer.json").write_text(word_tokenizer(WORDS[:6], ()).to_str())
    assert check_vocabularies(read(folder), folder) == [
        "target_tokenizer.json has tokens for 6 of the 7 ids that the model may give; the others leave no text"
    ]


@pytest.mark.parametrize(("key", "found"), [("source_bos_token_id", 7), ("source_eos_token_id", 8)])
def test_a_source_does_not_begin_or_end_twice(key: str, found: int, nn_folder: Callable[..., Path]) -> None:
    folder = nn_folder(**{"source_eos_token_id": None, key: 3})
    (folder / "tokenizer.json").write_text(word_tokenizer(WORDS, ("[CLS]", "[SEP]")).to_str())
    (folder / "target_tokenizer.json").write_text(word_tokenizer(WORDS[:7], ()).to_str())
    with pytest.raises(ExportError, match=rf"config\.json: {key} 3 is not what the post-processor .* adds \({found}\)"):
        check_vocabularies(read(folder), folder)
    edit(folder / "config.json", **{key: found})
    assert check_vocabularies(read(folder), folder) == []


@pytest.mark.parametrize("token", ["[CLS]", "[SEP]"])
@pytest.mark.parametrize("number", [9, 4_000_000_000])
def test_a_source_has_the_models_own_ids_around_it(token: str, number: int, nn_folder: Callable[..., Path]) -> None:
    folder = nn_folder(source_eos_token_id=None)
    content = json.loads(word_tokenizer(WORDS, ("[CLS]", "[SEP]")).to_str())
    content["post_processor"]["special_tokens"][token]["ids"] = [number]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=rf"tokenizer\.json or config\.json has {number} around a text, .* outside"):
        check_vocabularies(read(folder), folder)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {"b": 5}, "unk_token": "<unk>"}},
        {"normalizer": {"type": "Prepend", "prepend": "x " * 1000}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    *1000 * [{"SpecialToken": {"id": "x", "type_id": 0}}],
                ],
                "pair": [],
                "special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["x"]}},
            }
        },
    ],
    ids=["panics-normalizing", "panics-splitting", "knows-no-letter", "much-text", "many-tokens"],
)
def test_a_tokenizer_that_reads_no_letter_is_named(
    change: dict[str, Any], nn_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = nn_folder(source_eos_token_id=None)
    content = json.loads(word_tokenizer(WORDS, ()).to_str())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ExportError, match=r"tokenizer\.json cannot be read as a tokenizer .*; download it again"):
        check_vocabularies(read(folder), folder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "target", "side"), [(6000, 6000, None), (5000, 6000, "source"), (6000, 5000, "target")]
)
def test_sentencepiece_models_are_compared_on_both_sides(
    source: int, target: int, side: str | None, tmp_path: Path
) -> None:
    folder = write_nn_transformer(tmp_path / "nn", nn_config(source_vocab_size=source, target_vocab_size=target))
    for name in ("source.spm", "target.spm"):
        shutil.copy(FR_EN / name, folder)
    if side is not None:
        with pytest.raises(ExportError, match=rf"{side}\.spm has \d+ tokens .* the model's {side} vocabulary has 5000"):
            check_vocabularies(read(folder), folder)
    else:
        assert all("leave no text" in notice for notice in check_vocabularies(read(folder), folder))


def test_files_that_are_no_tokenizers_are_named(nn_folder: Callable[..., Path]) -> None:
    folder = nn_folder()
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(b"garbage")
    with pytest.raises(ExportError, match=r"(source|target)\.spm cannot be read as a tokenizer .*; download it again"):
        check_vocabularies(read(folder), folder)


@pytest.mark.parametrize(
    ("family", "name"), [("bart", "vocab.txt"), ("bart", "sentencepiece.bpe.model"), ("marian", "tokenizer.json")]
)
def test_a_tokenizer_that_is_not_read_is_told(family: str, name: str, tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "checkpoint", family, {}, {})
    assert check_vocabularies(read(folder), folder) == []
    (folder / name).write_text("{}")
    [told] = check_vocabularies(read(folder), folder)
    assert told.startswith(f"{name}: no tokenizer that is read with this kind of checkpoint, so requests carry")
