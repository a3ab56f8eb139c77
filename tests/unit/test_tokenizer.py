"""Text to ids and back: as transformers do it, and without a trace of special tokens."""

import gzip
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers

from beamline_export.reference import quiet_transformers
from beamline_server.bundle import Bundle, BundleError
from beamline_server.languages import Around, Languages
from beamline_server.tokenizer import Tokenizer, load_tokenizer
from doubles.service import make_manifest

MODEL = Path(__file__).parents[2] / "models" / "fr-en"
MARIAN_FILES = ["source.spm", "target.spm", "vocab.json"]
EOS, PAD = 0, 5999

TEXTS = [
    "Je ne sais pas.",
    "",
    " ",
    "  deux   espaces ",
    "Où ça ? Là-bas… « oui » !",
    "une ligne\net une autre\t!",
    "日本語 и кириллица 🙂",
    "a" * 500,
    "1 234,56 €",
    ">>en<< Bonjour.",
    ">>en<<Bonjour.",
    ">>pas un code",
    ">><< vide",
    "a >>en<< b",
    ">>en<< a >>fr<< b",
]


def bundle_of(folder: Path, kind: str, files: list[str], **tokens: Any) -> Bundle:
    """What a tokenizer needs of a bundle: a folder and a manifest."""
    dimensions = {
        "d_model": 8,
        "decoder_layers": 1,
        "decoder_heads": 1,
        "source_vocabulary": tokens.pop("vocabulary", 6000),
        "target_vocabulary": tokens.pop("target_vocabulary", 6000),
        "max_source_tokens": 64,
        "max_target_tokens": 64,
    }
    manifest = make_manifest(
        files={name: file_entry(folder / name) for name in files},
        tokenizer={"kind": kind, "files": files},
        dimensions=dimensions,
        special_tokens={"decoder_start": PAD, "eos": [EOS], "source_eos": EOS, "pad": PAD, **tokens},
        generation_defaults={"max_new_tokens": 32},
    )
    return Bundle(folder, manifest, "")


def file_entry(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def loaded(bundle: Bundle) -> Tokenizer:
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def marian() -> Tokenizer:
    return loaded(bundle_of(MODEL, "marian", MARIAN_FILES))


@pytest.fixture(scope="module")
def their_marian() -> Any:
    with quiet_transformers():  # it recommends a package that this model does not use
        return transformers.MarianTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("text", TEXTS)
def test_marian_ids_equal_those_of_transformers(text: str, marian: Tokenizer, their_marian: Any) -> None:
    assert marian.encode(text) == their_marian(text)["input_ids"]


@pytest.mark.parametrize(
    "text", ["I do not know.", "Where? \u201cOver there\u201d\u2026", "a  b", "", "$5.30 and 7 %", "日本語"]
)
def test_marian_text_equals_that_of_transformers(text: str, marian: Tokenizer, their_marian: Any) -> None:
    ids = their_marian(text_target=text)["input_ids"]
    assert marian.decode(ids) == their_marian.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", [*TEXTS, "I do not know.", "  a  b"])
def test_the_beginning_of_a_marian_target_has_the_ids_of_transformers(
    text: str, marian: Tokenizer, their_marian: Any
) -> None:
    assert marian.encode_target(text) == their_marian(text_target=text, add_special_tokens=False)["input_ids"]


def test_marian_round_trips(marian: Tokenizer) -> None:
    """The embedded model has one vocabulary for both sides."""
    text = "Je ne sais pas, dit-elle."
    assert marian.decode(marian.encode(text)) == text


def test_special_tokens_leave_no_trace(marian: Tokenizer) -> None:
    inner = marian.encode("Bonjour.")[:-1]
    assert marian.decode([PAD, *inner[:2], PAD, *inner[2:], EOS, PAD]) == "Bonjour."
    assert marian.decode([PAD, EOS]) == ""
    assert marian.decode([]) == ""


def test_unknown_ids_leave_no_trace(marian: Tokenizer) -> None:
    assert marian.decode([*marian.encode("Oui."), 999_999]) == "Oui."


def test_a_language_code_is_one_token(tmp_path: Path) -> None:
    for name in MARIAN_FILES:
        shutil.copy(MODEL / name, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    vocabulary[">>deu<<"] = 6000
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = loaded(bundle_of(tmp_path, "marian", MARIAN_FILES, vocabulary=6001))
    with_code = tokenizer.encode(">>deu<< Bonjour.")
    assert with_code == [6000, *tokenizer.encode("Bonjour.")]
    assert tokenizer.encode(">>xyz<< Bonjour.")[0] == vocabulary["<unk>"]
    assert tokenizer.encode_target(">>deu<< Guten") == [6000, *tokenizer.encode_target("Guten")]
    assert tokenizer.encode_target(">>xyz<< Guten")[0] == vocabulary["<unk>"]


def test_a_language_code_that_leaves_no_trace_in_text_is_one_token_too(tmp_path: Path) -> None:
    for name in MARIAN_FILES:
        shutil.copy(MODEL / name, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, ">>deu<<": 6000}))
    bundle = bundle_of(tmp_path, "marian", MARIAN_FILES, vocabulary=6001, target_vocabulary=6001)
    entry = bundle.manifest.tokenizer.model_copy(update={"special": (EOS, 1, PAD, 6000)})
    tokenizer = loaded(Bundle(tmp_path, bundle.manifest.model_copy(update={"tokenizer": entry}), ""))
    ids = tokenizer.encode_target(">>deu<< Guten")
    assert ids[0] == 6000
    assert tokenizer.decode(ids) == "Guten"


def test_marian_may_have_a_vocabulary_of_its_own_for_the_target(tmp_path: Path) -> None:
    for name in MARIAN_FILES:
        shutil.copy(MODEL / name, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    shifted = {piece: (number + 7) % 6000 for piece, number in vocabulary.items()}
    (tmp_path / "target_vocab.json").write_text(json.dumps(shifted))
    tokenizer = loaded(bundle_of(tmp_path, "marian", [*MARIAN_FILES, "target_vocab.json"]))
    ids = tokenizer.encode("Bonjour.")[:-1]
    assert tokenizer.decode([i + 7 for i in ids]) == "Bonjour."


def test_the_beginning_of_a_target_has_the_targets_own_vocabulary(tmp_path: Path, marian: Tokenizer) -> None:
    for name in MARIAN_FILES:
        shutil.copy(MODEL / name, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    shifted = {piece: (number + 7) % 6000 for piece, number in vocabulary.items()}
    (tmp_path / "target_vocab.json").write_text(json.dumps(shifted))
    tokens = {"eos": [7], "decoder_start": 6, "pad": None, "source_eos": EOS}
    tokenizer = loaded(bundle_of(tmp_path, "marian", [*MARIAN_FILES, "target_vocab.json"], **tokens))
    with quiet_transformers():
        theirs = transformers.MarianTokenizer.from_pretrained(tmp_path, separate_vocabs=True)
    for text in ["I do not know.", "日本語", ">>en<< a", ""]:
        ids = tokenizer.encode_target(text)
        assert ids == theirs(text_target=text, add_special_tokens=False)["input_ids"]
        assert ids == [(i + 7) % 6000 for i in marian.encode_target(text)]


def test_threads_share_a_tokenizer(marian: Tokenizer) -> None:
    texts = [f"Le numéro {i} est arrivé." for i in range(200)]
    expected = [marian.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(marian.encode, texts)) == expected
        assert list(pool.map(marian.decode, expected)) == texts


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.json like BART's: byte-level pairs, and <s> … </s> around every text."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<mask>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, then the dog sat on the cat"] * 4, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


JSON_TOKENS = {"decoder_start": 2, "eos": [2], "source_eos": 2, "source_bos": 0, "pad": 1, "forced_bos": 0}


def test_a_tokenizer_json_equals_transformers(byte_pairs: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(byte_pairs / "tokenizer.json"), eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )
    ours = loaded(bundle_of(byte_pairs, "tokenizers", ["tokenizer.json"], **JSON_TOKENS))
    for text in ["the cat", "", "Ünïcödé 🙂\n", "the cat sat on the mat and did not move for a long time"]:
        ids = theirs(text, truncation=False, padding=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode_target(text) == theirs(text_target=text, add_special_tokens=False)["input_ids"]
        assert ours.encode_target(text) == ids[1:-1]
        assert ours.decode([2, *ids, 1, 1]) == theirs.decode(ids, skip_special_tokens=True) == text


def test_words_that_the_model_does_not_have_are_unknown(tmp_path: Path) -> None:
    """A pretrained tokenizer may have words added to it that its model has no embedding for."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_tokens(["new"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = {"source_eos": 2, "eos": [2], "decoder_start": 2, "pad": None}
    whole = loaded(bundle_of(tmp_path, "tokenizers", ["tokenizer.json"], **tokens))
    small = loaded(bundle_of(tmp_path, "tokenizers", ["tokenizer.json"], vocabulary=3, **tokens))
    narrow = loaded(bundle_of(tmp_path, "tokenizers", ["tokenizer.json"], target_vocabulary=3, **tokens))
    assert whole.encode("a new a") == [1, 3, 1, 2]
    assert small.encode("a new a") == [1, 0, 1, 2]
    assert whole.encode_target("a new a") == small.encode_target("a new a") == [1, 3, 1]
    assert narrow.encode_target("a new a") == [1, 0, 1]


def test_special_ids_are_added_where_the_tokenizer_does_not(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "X": 9}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "x": 1, "y": 2, "z": 3}, unk_token="[UNK]"))
    other.save(str(tmp_path / "target_tokenizer.json"))
    tokens = {"source_bos": 7, "source_eos": 8, "eos": [3], "decoder_start": 5, "pad": None}
    one = loaded(bundle_of(tmp_path, "tokenizers", ["tokenizer.json"], **tokens))
    assert one.encode("a b c") == [7, 1, 2, 0, 8]
    assert one.encode("") == [7, 8]
    two = loaded(bundle_of(tmp_path, "tokenizers", ["tokenizer.json", "target_tokenizer.json"], **tokens))
    assert two.encode("a b c") == [7, 1, 2, 0, 8]
    assert two.decode([5, 1, 2, 3]).split() == ["x", "y"]
    assert one.encode_target("a b c") == [1, 2, 0]
    assert two.encode_target("x") == [1]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model whose piece numbers are the ids."""
    folder = tmp_path_factory.mktemp("spm")
    model = io.BytesIO()
    words = ["the cat sat on the mat", "a dog ran to the cat", "who let the dogs out"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=9
    )
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model.getvalue())
    return folder


def test_sentencepiece_round_trips_between_its_special_ids(pieces: Path) -> None:
    tokens = {"source_bos": 1, "source_eos": 2, "eos": [2], "decoder_start": 1, "pad": None}
    tokenizer = loaded(bundle_of(pieces, "sentencepiece", ["source.spm", "target.spm"], **tokens))
    ids = tokenizer.encode("the dog sat")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode([*ids, 5999]) == "the dog sat"
    assert tokenizer.encode_target("the dog sat") == ids[1:-1]
    assert tokenizer.encode("") == [1, 2]
    assert tokenizer.encode_target("") == []


def test_pieces_that_the_model_does_not_have_are_unknown_at_the_beginning_of_a_target(pieces: Path) -> None:
    tokens = {"source_eos": 2, "eos": [2], "decoder_start": 1, "pad": None}
    files = ["source.spm", "target.spm"]
    whole = loaded(bundle_of(pieces, "sentencepiece", files, **tokens)).encode_target("the dog sat")
    most = max(whole)
    small = loaded(bundle_of(pieces, "sentencepiece", files, target_vocabulary=most, **tokens))
    assert small.encode_target("the dog sat") == [0 if i == most else i for i in whole]


def test_pieces_are_left_out_where_the_model_has_not_even_the_unknown_one(tmp_path: Path, marian: Tokenizer) -> None:
    for name in MARIAN_FILES:
        shutil.copy(MODEL / name, tmp_path)
    ids = marian.encode_target("I do not know.")
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    known = {piece: number for piece, number in vocabulary.items() if piece != "<unk>"}
    (tmp_path / "target_vocab.json").write_text(json.dumps({**known, "<unk>": 6000}))
    tokens = {"target_vocabulary": max(ids)}
    tokenizer = loaded(bundle_of(tmp_path, "marian", [*MARIAN_FILES, "target_vocab.json"], eos=[0], pad=None, **tokens))
    assert tokenizer.encode_target("I do not know.") == [i for i in ids if i != max(ids)]
    assert tokenizer.encode_target(">>xyz<<") == []


@pytest.mark.parametrize("own", [False, True], ids=["one-vocabulary", "two-vocabularies"])
def test_marian_targets_are_read_with_the_targets_pieces(own: bool, pieces: Path, tmp_path: Path) -> None:
    shutil.copy(MODEL / "source.spm", tmp_path)
    shutil.copy(pieces / "target.spm", tmp_path)
    vocabulary = json.loads((MODEL / "vocab.json").read_text())
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "target.spm"))
    for piece in map(model.id_to_piece, range(model.get_piece_size())):
        vocabulary.setdefault(piece, len(vocabulary))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "target_vocab.json").write_text(json.dumps(vocabulary))
    files = [*MARIAN_FILES, "target_vocab.json"] if own else MARIAN_FILES
    sizes = {"vocabulary": len(vocabulary), "target_vocabulary": len(vocabulary)}
    tokenizer = loaded(bundle_of(tmp_path, "marian", files, **sizes))
    with quiet_transformers():
        theirs = transformers.MarianTokenizer.from_pretrained(tmp_path, separate_vocabs=own)
    text = "the cat sat on the mat"
    assert tokenizer.encode_target(text) == theirs(text_target=text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_target(text) != tokenizer.encode(text)[:-1]
    assert tokenizer.decode(tokenizer.encode_target(text)) == text


WRITTEN = ["a </s> b", "</s>", "<s> a", "a<pad>b", "</s></s>", " </s>", "the <mask> sat", "<unk> <s></s> x"]


@pytest.mark.parametrize("text", WRITTEN)
def test_special_tokens_in_a_text_are_text_to_byte_pairs(text: str, byte_pairs: Path) -> None:
    tokenizer = loaded(bundle_of(byte_pairs, "tokenizers", ["tokenizer.json"], **JSON_TOKENS))
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1]) == (0, 2)
    assert not set(ids[1:-1]) & {0, 1, 2, 3}
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_target(text) == ids[1:-1]


@pytest.mark.parametrize("text", WRITTEN)
def test_special_tokens_in_a_text_are_text_to_marian(text: str, marian: Tokenizer, their_marian: Any) -> None:
    """Read by SentencePiece as any other characters."""
    ids = marian.encode(text)
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS
    assert PAD not in ids
    pieces = their_marian.spm_source.encode(text, out_type=str)
    assert ids[:-1] == [their_marian.encoder.get(piece, 1) for piece in pieces]
    target = marian.encode_target(text)
    assert not {EOS, PAD} & set(target)
    assert target == [
        their_marian.encoder.get(piece, 1) for piece in their_marian.spm_target.encode(text, out_type=str)
    ]


@pytest.mark.parametrize("text", WRITTEN)
def test_special_tokens_in_a_text_are_text_to_sentencepiece(text: str, pieces: Path) -> None:
    tokens = {"source_bos": 1, "source_eos": 2, "eos": [2], "decoder_start": 1, "pad": None}
    tokenizer = loaded(bundle_of(pieces, "sentencepiece", ["source.spm", "target.spm"], **tokens))
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1]) == (1, 2)
    assert not set(ids[1:-1]) & {1, 2}
    assert tokenizer.encode_target(text) == ids[1:-1]


def test_special_tokens_that_are_words_of_a_vocabulary_are_unknown(tmp_path: Path) -> None:
    """There are no characters to read them as, and no way for a caller to end a source where it does not end."""
    words = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3, "<s>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = {"source_bos": 4, "source_eos": 3, "eos": [3], "decoder_start": 4, "pad": None}
    ours = loaded(bundle_of(tmp_path, "tokenizers", ["tokenizer.json"], **tokens))
    assert ours.encode("a </s> b") == [4, 1, 0, 2, 3]
    assert ours.encode("<s> a </s>") == [4, 0, 1, 0, 3]
    assert ours.encode_target("<s> a </s>") == [0, 1, 0]


def test_special_tokens_that_are_pieces_of_a_model_are_unknown(tmp_path: Path) -> None:
    """A SentencePiece model whose trainer was told to keep them whole."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 5),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        user_defined_symbols=["<pad>", "<end>"],
        minloglevel=9,
    )
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    end = processor.piece_to_id("<end>")
    tokens = {"source_eos": end, "eos": [end], "decoder_start": 1, "pad": None}
    tokenizer = loaded(bundle_of(tmp_path, "sentencepiece", ["source.spm", "target.spm"], **tokens))
    ids = tokenizer.encode("the<end> cat<pad>")
    assert (ids.count(end), ids[-1]) == (1, end)
    assert processor.piece_to_id("<pad>") not in ids
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    marian = loaded(bundle_of(tmp_path, "marian", MARIAN_FILES, **tokens))
    assert marian.encode("the<end> cat<pad>") == ids
    assert tokenizer.encode_target("the<end> cat<pad>") == marian.encode_target("the<end> cat<pad>") == ids[:-1]


def test_a_language_code_stays_the_first_token_alone(marian: Tokenizer) -> None:
    """The one exception: and what looks like one further on is text."""
    assert marian.encode(">></s><<a") == [1, *marian.encode("a")]
    assert marian.encode("a >></s><<").count(EOS) == 1


CLEANED = [
    "Hello , world !",
    "do n't ca n't",
    "I 'm , he 's , we 've , they 're",
    "so ' quoted ' text",
    " . . ? ! ,",
    "a ' .b ' s",
    "n 't  n't",
    "It is 's 'm .",
    "1 , 234 . 56",
    "no change",
    "",
]


@pytest.mark.parametrize("text", CLEANED)
def test_texts_are_cleaned_up_as_by_transformers(text: str, byte_pairs: Path, tmp_path: Path) -> None:
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(byte_pairs / "tokenizer.json"), clean_up_tokenization_spaces=True, **{forced: True}
    )
    bundle = bundle_of(byte_pairs, "tokenizers", ["tokenizer.json"], **JSON_TOKENS)
    ours = loaded(cleaning(bundle))
    ids = ours.encode(text)
    assert ours.encode_target(text) == loaded(bundle).encode_target(text) == ids[1:-1]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert loaded(bundle).decode(ids) == text


def cleaning(bundle: Bundle) -> Bundle:
    """The bundle, whose texts are cleaned up."""
    entry = bundle.manifest.tokenizer.model_copy(update={"clean_up_spaces": True})
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"tokenizer": entry}), "")


def test_marian_texts_are_cleaned_up_as_by_transformers(marian: Tokenizer, their_marian: Any) -> None:
    """Every test sentence of the embedded model, both languages."""
    with gzip.open(MODEL / "test.tsv.gz", "rt", encoding="utf-8") as stream:
        texts = [text for line in stream for text in line.rstrip("\n").split("\t")[:2]]
    cleaned = loaded(cleaning(bundle_of(MODEL, "marian", MARIAN_FILES)))
    changed = 0
    for text in [*texts, *CLEANED]:
        ids = marian.encode(text)
        found = cleaned.decode(ids)
        assert found == their_marian.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        changed += found != marian.decode(ids)
    assert changed > 100


def test_ids_that_leave_no_trace_may_be_named(marian: Tokenizer) -> None:
    """Then they are all: an end of sequence that is a word stays one."""
    bundle = bundle_of(MODEL, "marian", MARIAN_FILES, eos=[EOS, 2])
    entry = bundle.manifest.tokenizer.model_copy(update={"special": (EOS, 1, PAD)})
    named = loaded(Bundle(MODEL, bundle.manifest.model_copy(update={"tokenizer": entry}), ""))
    ids = marian.encode("Je ne sais pas.")
    assert 2 in ids
    assert named.decode(ids) == "Je ne sais pas."
    assert 2 in named.encode_target("I do not know.")
    assert loaded(bundle).decode(ids) == "Je ne sais pas"


def test_a_model_without_tokenizer_has_none() -> None:
    assert load_tokenizer(bundle_of(MODEL, "none", [])) is None


def garbage(folder: Path) -> None:
    (folder / "source.spm").write_bytes(b"garbage")


def empty(folder: Path) -> None:
    (folder / "target.spm").write_bytes(b"")


def vocabulary(content: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "vocab.json").write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        pytest.param(garbage, r"source\.spm is no SentencePiece model", id="garbage"),
        pytest.param(empty, r"target\.spm is no SentencePiece model", id="empty"),
        pytest.param(vocabulary([1, 2]), r"vocab\.json is no object of pieces", id="list"),
        pytest.param(vocabulary({"<unk>": "1"}), r"vocab\.json is no object of pieces", id="strings"),
        pytest.param(vocabulary({"a": 1}), "<unk> is not in the vocabulary", id="no-unknown"),
        pytest.param(vocabulary({"<unk>": 1, "a": 6000}), "it has ids up to 6000, the model has 6000", id="too-large"),
    ],
)
def test_a_broken_marian_tokenizer_is_named(spoil: Callable[[Path], None], problem: str, tmp_path: Path) -> None:
    for name in MARIAN_FILES:
        shutil.copy(MODEL / name, tmp_path)
    spoil(tmp_path)
    with pytest.raises(BundleError, match=f"its marian tokenizer cannot be read .*{problem}") as caught:
        load_tokenizer(bundle_of(tmp_path, "marian", MARIAN_FILES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "?"}}', "[" * 100_000])
def test_a_broken_tokenizer_json_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match="its tokenizers tokenizer cannot be read"):
        load_tokenizer(bundle_of(tmp_path, "tokenizers", ["tokenizer.json"]))


@pytest.mark.parametrize("name", MARIAN_FILES)
def test_a_file_that_has_changed_since_it_was_verified_is_not_used(name: str, tmp_path: Path) -> None:
    for file in MARIAN_FILES:
        shutil.copy(MODEL / file, tmp_path)
    bundle = bundle_of(tmp_path, "marian", MARIAN_FILES)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-2] + b" " + content[-1:])
    with pytest.raises(BundleError, match=rf"{name}: does not match its checksum"):
        load_tokenizer(bundle)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for file in MARIAN_FILES:
        shutil.copy(MODEL / file, tmp_path)
    bundle = bundle_of(tmp_path, "marian", MARIAN_FILES)
    (tmp_path / "target.spm").unlink()
    with pytest.raises(BundleError, match=r"target\.spm: is missing"):
        load_tokenizer(bundle)


def test_a_sentencepiece_model_larger_than_the_model_is_named(pieces: Path) -> None:
    with pytest.raises(BundleError, match="it has ids up to"):
        load_tokenizer(bundle_of(pieces, "sentencepiece", ["source.spm", "target.spm"], vocabulary=10))


def with_languages(bundle: Bundle, marked: str, begins: str, **codes: int) -> Tokenizer:
    entry = {"source": marked.startswith("source"), "target": True}
    described = {"codes": {n: {"token": i, **entry} for n, i in codes.items()}, "source_marked": marked}
    languages = Languages.model_validate({**described, "target_begins": begins})
    return loaded(Bundle(bundle.path, bundle.manifest.model_copy(update={"languages": languages}), ""))


def test_a_marian_language_that_is_asked_for_is_that_in_the_text(tmp_path: Path) -> None:
    """As `>>deu<< text`; then no code in the text is one."""
    for name in MARIAN_FILES:
        shutil.copy(MODEL / name, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text()) | {">>deu<<": 6000, ">>fra<<": 6001}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with quiet_transformers():
        theirs = transformers.MarianTokenizer.from_pretrained(tmp_path)
    sizes = {"vocabulary": 6002, "target_vocabulary": 6002}
    ours = with_languages(
        bundle_of(tmp_path, "marian", MARIAN_FILES, **sizes), "target_before", "none", deu=6000, fra=6001
    )
    for text in TEXTS:
        assert ours.encode(text, Around(before=(6000,))) == theirs(f">>deu<< {text}")["input_ids"]
    assert ours.encode(">>fra<< a") == theirs(">>fra<< a")["input_ids"]
    assert 6001 not in ours.encode(">>fra<< a", Around(before=(6000,)))


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as those of multilingual models: its post-processor puts one of its languages in front."""
    folder = tmp_path_factory.mktemp("coded")
    words = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", "en_XX", "fr_XX"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="en_XX $A </s>", special_tokens=[("en_XX", 4), ("</s>", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_languages_stand_around_a_text_in_place_of_the_post_processors(coded: Path) -> None:
    tokens = {"source_eos": 3, "eos": [3], "decoder_start": 3, "pad": None}
    bundle = bundle_of(coded, "tokenizers", ["tokenizer.json"], **tokens)
    assert loaded(bundle).encode("a b") == [4, 1, 2, 3]
    before = with_languages(bundle, "source_before", "forced_first", en_XX=4, fr_XX=5)
    assert before.encode("a b", Around(before=(5,))) == [5, 1, 2, 3]
    behind = with_languages(bundle, "source_after", "decoder_start", en_XX=4, fr_XX=5)
    assert behind.encode("a b", Around(after=(5,))) == [1, 2, 3, 5]
    target = with_languages(bundle, "none", "forced_first", en_XX=4, fr_XX=5)
    assert target.encode("a b") == [4, 1, 2, 3]


def test_a_language_that_is_written_in_a_text_is_text(coded: Path, pieces: Path) -> None:
    tokens = {"source_eos": 3, "eos": [3], "decoder_start": 3, "pad": None}
    bundle = bundle_of(coded, "tokenizers", ["tokenizer.json"], **tokens)
    ours = with_languages(bundle, "source_before", "forced_first", en_XX=4, fr_XX=5)
    assert ours.encode("fr_XX a", Around(before=(4,))) == [4, 0, 1, 3]
    assert ours.encode_target("fr_XX a") == [0, 1]
    # A word that is no special token of its file is one where it is a language.
    other = with_languages(bundle, "source_before", "forced_first", word=2)
    assert other.encode("a b", Around(before=(2,))) == [2, 1, 0, 3]
    files = ["source.spm", "target.spm"]
    tokens = {"source_eos": 2, "eos": [2], "decoder_start": 1, "pad": None}
    spm = bundle_of(pieces, "sentencepiece", files, **tokens)
    cat = loaded(spm).encode("cat")
    coded_spm = with_languages(spm, "source_after", "forced_first", x=cat[0])
    assert coded_spm.encode("cat", Around(after=(cat[0],))) == [0, *cat[1:], cat[0]]


def test_a_language_that_a_target_begins_with_leaves_no_trace(coded: Path) -> None:
    tokens = {"source_eos": 3, "eos": [3], "decoder_start": 3, "pad": None}
    bundle = bundle_of(coded, "tokenizers", ["tokenizer.json"], **tokens)
    words = {"a": 1, "b": 2}
    assert with_languages(bundle, "source_before", "forced_first", **words).decode([3, 2, 1, 0, 3]).split() == ["[UNK]"]
    assert with_languages(bundle, "target_before", "none", **words).decode([3, 2, 1, 3]).split() == ["b", "a"]
