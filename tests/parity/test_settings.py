"""A checkpoint's own settings and tokenizer files: text in, text out, as transformers' tokenizer and `generate`."""

import gzip
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from beamline_export.agreement import search_all
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.reference import quiet_transformers
from beamline_export.testing import write_hugging_face
from beamline_server.bundle import Bundle
from beamline_server.models.load import build_backend, model_rules
from beamline_server.rpc.converters import default_search, limits_of
from beamline_server.settings import Settings
from beamline_server.tokenizer import load_tokenizer

pytestmark = pytest.mark.parity

FR_EN = Path(__file__).parents[2] / "models" / "fr-en"
CLASSES = {"marian": "MarianMTModel", "bart": "BartForConditionalGeneration"}
ENGLISH = [
    "the cat",
    "a dog ran to the cat.",
    "who let the dogs out ?",
    "the cat sat on the mat, then the dog sat on the cat",
    "on the mat",
    "dogs",
    "the dog's mat isn't out",
    "the",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[CLS]", "[SEP]"]


def french() -> list[str]:
    with gzip.open(FR_EN / "test.tsv.gz", "rt", encoding="utf-8") as stream:
        return [line.split("\t")[0] for line in stream][::84][:24]


def ours(bundle: Bundle, texts: Sequence[str]) -> list[list[str]]:
    """The texts of all hypotheses that a request without options gets."""
    manifest, tokenizer = bundle.manifest, load_tokenizer(bundle)
    assert tokenizer is not None
    options = default_search(manifest.generation_defaults, limits_of(Settings(), manifest))
    searches = [(tuple(tokenizer.encode(text)), options) for text in texts]
    found = search_all(build_backend(bundle, "cpu", threads=1), model_rules(manifest), searches)
    return [[tokenizer.decode(hypothesis.tokens) for hypothesis in answer.hypotheses] for answer in found]


def theirs(folder: Path, family: str, texts: Sequence[str]) -> list[list[str]]:
    """The same as transformers give it, with nothing but the folder."""
    with quiet_transformers(), torch.inference_mode():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, CLASSES[family]).from_pretrained(folder, dtype=torch.float32).eval()
        sequences = [model.generate(torch.tensor([tokenizer(text)["input_ids"]])).tolist() for text in texts]
        return [[tokenizer.decode(s, skip_special_tokens=True) for s in found] for found in sequences]


def same(folder: Path, family: str, texts: Sequence[str]) -> int:
    """How many texts get the same answers."""
    bundle = export(folder, folder.with_name("bundle"), ExportOptions(), Progress(io.StringIO()))
    pairs = zip(ours(bundle, texts), theirs(folder, family, texts), strict=True)
    return sum(a == b for a, b in pairs)


def edit(file: Path, **changes: Any) -> None:
    """Change a JSON file; a value of `...` removes the key."""
    data = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
    file.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))


@pytest.fixture
def fr_en(tmp_path: Path) -> Path:
    """A copy of the embedded model that may be changed."""
    ignore = shutil.ignore_patterns("*.gz", "*.py", "*.txt")
    return Path(shutil.copytree(FR_EN, tmp_path / "checkpoint", ignore=ignore))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        pytest.param("generation_config.json", {"eos_token_id": [5999, 0]}, id="two-ends"),
        pytest.param("generation_config.json", {"eos_token_id": [0, 2]}, id="a-full-stop-ends"),
        pytest.param("generation_config.json", {"num_return_sequences": 3}, id="three-answers"),
        pytest.param("tokenizer_config.json", {"clean_up_tokenization_spaces": True}, id="cleaned-up"),
        pytest.param("tokenizer_config.json", {"eos_token": "%"}, id="another-end"),
        pytest.param("tokenizer_config.json", {"extra_special_tokens": ["\u2581the", "\u2581a"]}, id="special-words"),
        pytest.param("special_tokens_map.json", {"eos_token": ";"}, id="special-tokens-map"),
    ],
)
def test_fr_en_translates_as_transformers_do(file: str, changes: dict[str, Any], fr_en: Path) -> None:
    edit(fr_en / file, **changes)
    assert same(fr_en, "marian", french()) == 24


def test_two_vocabularies_have_two_ends(tmp_path: Path) -> None:
    """A source ends with the source's `</s>`, and the target's leaves no trace in text."""
    folder = tmp_path / "checkpoint"
    ids = {"eos_token_id": 7, "pad_token_id": 5999, "decoder_start_token_id": 5999, "bos_token_id": None}
    sizes = {"vocab_size": 6000, "decoder_vocab_size": 6000, "share_encoder_decoder_embeddings": False}
    write_hugging_face(folder, "marian", {**sizes, **ids}, {**ids, "eos_token_id": [2, 7]}, seed=3)
    for name in ("source.spm", "target.spm", "vocab.json"):
        shutil.copy(FR_EN / name, folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "target_vocab.json").write_text(json.dumps({p: (i + 7) % 6000 for p, i in vocabulary.items()}))
    edit(folder / "tokenizer_config.json", separate_vocabs=True)
    bundle = export(folder, folder.with_name("bundle"), ExportOptions(), Progress(io.StringIO()))
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    with quiet_transformers():
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in french():
        assert tokenizer.encode(text) == their_tokenizer(text)["input_ids"]
        assert tokenizer.encode(text)[-1] == 0
        words = [i + 7 for i in tokenizer.encode(text)[:-1]]
        assert tokenizer.decode([*words, 7]) == their_tokenizer.decode(words, skip_special_tokens=True)


def write_bart(
    folder: Path,
    config: dict[str, Any],
    *,
    around: tuple[str, str] | None = ("<s>", "</s>"),
    tokenizer_config: dict[str, Any] | None = None,
) -> Path:
    """A random BART with a byte-level tokenizer whose post-processor puts these tokens around a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ENGLISH * 4, trainer)
    if around is not None:
        ids = [(token, SPECIAL.index(token)) for token in around]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{around[0]} $A {around[1]}", special_tokens=ids
        )
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    write_hugging_face(folder, "bart", {"vocab_size": tokenizer.get_vocab_size(), **tokens}, tokens, seed=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "config.json", **config)
    if tokenizer_config is not None:
        edit(folder / "tokenizer_config.json", **tokenizer_config)
    return folder


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer"),
    [
        pytest.param(None, {"force_bos_token_to_be_generated": True, "num_beams": 2}, {}, id="forced-bos-of-before"),
        pytest.param(None, {"num_beams": 4, "num_return_sequences": 4, "max_length": 9}, {}, id="four-answers"),
        pytest.param({}, {"force_bos_token_to_be_generated": True}, {}, id="forced-bos-without-effect"),
        pytest.param({}, {}, {"around": ("[CLS]", "[SEP]"), "tokenizer_config": PLAIN}, id="cls-and-sep"),
        pytest.param({}, {}, {"around": None, "tokenizer_config": PLAIN}, id="nothing-around"),
        pytest.param({}, {}, {"around": None}, id="nothing-around-in-the-file"),
        pytest.param(
            {},
            {},
            {"around": None, "tokenizer_config": {"cls_token": "[CLS]", "sep_token": "[SEP]"}},
            id="named-around",
        ),
        pytest.param({"bos_token_id": 9}, {"bos_token_id": 9}, {}, id="another-bos-in-the-config"),
        pytest.param({"eos_token_id": [5, 2]}, {}, {}, id="two-ends"),
        pytest.param({}, {}, {"tokenizer_config": {"clean_up_tokenization_spaces": True}}, id="cleaned-up-never"),
        pytest.param(
            {"max_new_tokens": 30},
            {},
            {
                "tokenizer_config": {
                    "clean_up_tokenization_spaces": True,
                    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
                }
            },
            id="cleaned-up",
        ),
        pytest.param(
            {}, {}, {"tokenizer_config": {"extra_special_tokens": ["\u0120", "Z", "Q", "#"]}}, id="special-words"
        ),
    ],
)
def test_bart_answers_as_transformers_do(
    generation: dict[str, Any] | None, config: dict[str, Any], tokenizer: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_bart(tmp_path / "checkpoint", config, **tokenizer)
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        edit(folder / "generation_config.json", **generation)
    assert same(folder, "bart", ENGLISH) == 8
