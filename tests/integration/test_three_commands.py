"""From an unpacked checkpoint to a line of text in three commands, for five kinds of folder."""

import io
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from beamline_export.testing import nn_config, randomize, write_hugging_face
from beamline_server.process import BEAMLINE, ServerProcess
from doubles import annotated, fairseq_files

TEXT = "ein kleiner hund und die katze"
SENTENCES = [TEXT, "eine kleine katze", "der hund und die katze", "klein und rund", "hund und katze sind rund"] * 8
Folder = Callable[[Path], tuple[Path, Sequence[str]]]
"""Writes a checkpoint; returns it, and options for `beamline translate`."""


def words(special: Sequence[str], around: str, size: int = 90) -> Tokenizer:
    """A tokenizer.json of pieces, with this around a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=size, special_tokens=list(special)))
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return tokenizer


def nllb(folder: Path) -> tuple[Path, Sequence[str]]:
    codes = ["deu_Latn", "eng_Latn"]
    tokenizer = words(["<s>", "<pad>", "</s>", "<unk>", *codes], "deu_Latn $A </s>")
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    write_hugging_face(folder, "m2m_100", {"vocab_size": tokenizer.get_vocab_size(), **ids}, {**ids, "max_length": 12})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "NllbTokenizer", "src_lang": "deu_Latn", "additional_special_tokens": codes}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, ["--from", "deu_Latn", "--to", "eng_Latn"]


def t5(folder: Path) -> tuple[Path, Sequence[str]]:
    tokenizer = words(["<pad>", "</s>", "<unk>"], "$A </s>")
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    write_hugging_face(folder, "t5", {"vocab_size": tokenizer.get_vocab_size(), **ids}, {**ids, "max_length": 12})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, ["--beam", "4"]


def annotated_transformer(folder: Path) -> tuple[Path, Sequence[str]]:
    folder.mkdir()
    model = annotated.AnnotatedTransformer().eval()
    randomize(model, 3)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = nn_config(
        d_model=annotated.WIDTH,
        layout="annotated_transformer",
        source_eos_token_id=1,
        generation={"max_new_tokens": 12},
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "target_tokenizer.json"):
        words(["<pad>", "</s>", "<s>", "<unk>"], "$A </s>", size=annotated.SOURCE).save(str(folder / name))
    return folder, ["--beam", "2"]


def makemore(folder: Path) -> tuple[Path, Sequence[str]]:
    characters = sorted({*"".join(SENTENCES)})
    width, layers, positions = 16, 2, 48
    shapes = {
        "transformer.wte": (len(characters) + 1, width),
        "transformer.wpe": (positions, width),
        "transformer.ln_f": (width,),
        "lm_head": (len(characters) + 1, width),
    }
    for block in (f"transformer.h.{i}" for i in range(layers)):
        shapes |= {f"{block}.{name}": (width,) for name in ("ln_1", "ln_2")}
        shapes |= {f"{block}.attn.c_attn": (3 * width, width), f"{block}.attn.c_proj": (width, width)}
        shapes |= {f"{block}.mlp.c_fc": (4 * width, width), f"{block}.mlp.c_proj": (width, 4 * width)}
    torch.manual_seed(1)
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    bare = ("transformer.wte", "transformer.wpe", "lm_head")
    state |= {f"{name}.bias": torch.randn(shape[:1]) for name, shape in shapes.items() if name not in bare}
    folder.mkdir()
    torch.save(state, folder / "model.pt")
    (folder / "words.txt").write_text("\n".join(SENTENCES))
    (folder / "config.json").write_text('{"model_type": "makemore", "words_file": "words.txt", "n_head": 4}')
    return folder, ["--beam", "8"]


def fairseq(folder: Path) -> tuple[Path, Sequence[str]]:
    args = fairseq_files.ARGS
    fairseq_files.written(folder, args, fairseq_files.state_of(args), max_positions=30, max_new_tokens=12)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=24, minloglevel=2
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [spm.id_to_piece(i) for i in range(3, spm.get_piece_size())]
    for side in ("de", "en"):
        (folder / f"dict.{side}.txt").write_text("".join(f"{piece} 1\n" for piece in pieces))
    return folder, ["--beam", "4"]


def ran(*arguments: str | Path) -> str:
    """What `beamline` writes with these arguments."""
    command = [str(BEAMLINE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_transformers(checkpoint: Path, name: str) -> str:
    """What transformers make of the text, with the search that the test asks for."""
    tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    asked: dict[str, Any] = {"num_beams": 4}
    if name == "nllb":
        asked = {"num_beams": 1, "forced_bos_token_id": tokenizer.convert_tokens_to_ids("eng_Latn")}
    ids = model.generate(torch.tensor([tokenizer(TEXT).input_ids]), **asked, max_new_tokens=11)[0]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize(
    "write", [nllb, t5, annotated_transformer, makemore, fairseq], ids=lambda write: write.__name__
)
def test_a_checkpoint_is_served_in_three_commands(write: Folder, tmp_path: Path) -> None:
    checkpoint, options = write(tmp_path / "checkpoint")
    ran("export", checkpoint, "-o", tmp_path / "bundle")
    with ServerProcess(tmp_path / "bundle") as server:
        server.wait_until_serving()
        written = ran("translate", "--server", server.target, *options, TEXT)
        again = ran("translate", "--server", server.target, "--json", *options, TEXT)
        assert server.stop() == 0
    told: dict[str, Any] = json.loads(again)
    assert written.rstrip("\n") == told["hypotheses"][0]["text"]
    assert written.rstrip("\n")
    if write in (nllb, t5):
        assert written.rstrip("\n") == by_transformers(checkpoint, write.__name__)
