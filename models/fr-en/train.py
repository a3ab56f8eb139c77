"""Train the French-English model of this folder, or one like it, and write it as a Hugging Face MarianMT folder.

    python models/fr-en/train.py --data DIR -o OUT      the whole recipe
    python models/fr-en/train.py --smoke -o OUT         the same road in seconds, with a toy model

DIR holds train.tsv.gz, valid.tsv.gz and test.tsv.gz: UTF-8 lines of French TAB English (more English columns are more
references). Standard output gets one line, a JSON report. Shapes: `B` pairs, `S` source tokens, `T` target tokens.
"""

import argparse
import gzip
import io
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import sacrebleu
import sentencepiece
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, MarianConfig, MarianMTModel, MarianTokenizer
from transformers.utils import logging as transformers_logging

Pair = tuple[str, str]
Example = tuple[list[int], list[int]]  # source ids, target ids; each ends with </s>

EOS = 0
UNK = 1
IGNORED = -100  # the label that cross-entropy and MarianMT's shift leave out
MAX_TOKENS = 100  # a side of a training pair
MAX_POSITIONS = 256
LABEL_SMOOTHING = 0.1
MAX_GRADIENT_NORM = 1.0
TRANSLATED_TOGETHER = 64
EMBEDDED_TEST = Path(__file__).with_name("test.tsv.gz")


class RecipeError(Exception):
    """Training cannot go on, for a reason that the user can mend; the text is one line."""


# --- The recipe ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the optimizer. `casual_share` of the pairs are written the way people type in a hurry."""

    name: str
    steps: int
    peak_rate: float
    warmup_steps: int
    casual_share: float = 0.0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear to the peak, then a half cosine to zero."""
        warmup = min(self.warmup_steps, self.steps // 4)  # a shortened run must still reach its cosine
        if step < warmup:
            return self.peak_rate * (step + 1) / warmup
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained, and how."""

    vocabulary: int
    d_model: int
    heads: int
    feed_forward: int
    encoder_layers: int
    decoder_layers: int
    batch_tokens: int
    max_output_tokens: int
    stages: tuple[Stage, ...]

    def with_steps(self, steps: int) -> "Recipe":
        """The recipe with `steps` in its first stage and the others in proportion."""
        factor = steps / self.stages[0].steps
        return replace(self, stages=tuple(replace(s, steps=max(1, round(s.steps * factor))) for s in self.stages))


FULL = Recipe(
    vocabulary=6000,
    d_model=256,
    heads=4,
    feed_forward=1024,
    encoder_layers=4,
    decoder_layers=2,
    batch_tokens=4096,
    max_output_tokens=200,
    stages=(
        Stage("clean", steps=3300, peak_rate=1.5e-3, warmup_steps=800),
        Stage("casual", steps=1000, peak_rate=4e-4, warmup_steps=50, casual_share=0.2),
    ),
)

SMOKE = Recipe(
    vocabulary=400,
    d_model=32,
    heads=2,
    feed_forward=64,
    encoder_layers=1,
    decoder_layers=1,
    batch_tokens=1024,
    max_output_tokens=24,
    stages=(
        Stage("clean", steps=60, peak_rate=5e-3, warmup_steps=10),
        Stage("casual", steps=20, peak_rate=1e-3, warmup_steps=5, casual_share=0.2),
    ),
)


# --- Data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sentence pairs: to learn from, to watch the loss on, to score at the end."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a gzipped file of `source TAB reference [TAB reference ...]` lines, one pair for each reference.

    Raises:
        RecipeError: the file is missing, damaged, empty, or has a line that is not of this form.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            rows = [line.rstrip("\r\n").split("\t") for line in lines]
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if len(row) < 2 or not all(row):
            raise RecipeError(f"{path}: line {number} is not French TAB English")
    if not rows:
        raise RecipeError(f"{path}: no sentence pairs")
    return [(source, reference) for source, *references in rows for reference in references]


def read_corpus(folder: Path) -> Corpus:
    """The corpus in a folder of train.tsv.gz, valid.tsv.gz and test.tsv.gz."""
    return Corpus(*(read_pairs(folder / f"{part}.tsv.gz") for part in ("train", "valid", "test")))


def smoke_corpus() -> Corpus:
    """A toy corpus out of the test sentences of this folder; its scores mean nothing."""
    pairs = read_pairs(EMBEDDED_TEST)
    return Corpus(train=pairs[100:], valid=pairs[20:100], test=pairs[:20])


def without_final_punctuation(text: str) -> str:
    """The text less its closing full stop, question or exclamation mark and the blank that French puts before it."""
    return re.sub(r"\s*[.!?…]+$", "", text) or text


def with_small_initial(text: str) -> str:
    """The text with its first letter in lower case."""
    return text[:1].lower() + text[1:]


CASUAL_HABITS = (
    (without_final_punctuation,),
    (with_small_initial,),
    (without_final_punctuation, with_small_initial),
)


def casual(pair: Pair, rng: random.Random) -> Pair:
    """The pair in a casual spelling, the same on both sides: the model learns to answer the way it is asked."""
    source, target = pair
    for habit in rng.choice(CASUAL_HABITS):
        source, target = habit(source), habit(target)
    return source, target


def with_casual_share(pairs: Sequence[Pair], share: float, rng: random.Random) -> list[Pair]:
    """The pairs in their order, about `share` of them in a casual spelling."""
    return [casual(pair, rng) if rng.random() < share else pair for pair in pairs]


# --- Vocabulary ------------------------------------------------------------------------------------------------------


class Vocabulary:
    """One SentencePiece model for both languages, numbered as MarianMT wants: `</s>` 0, `<unk>` 1, pieces, `<pad>`."""

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def learn(cls, pairs: Sequence[Pair], size: int) -> "Vocabulary":
        """The vocabulary of exactly `size` ids that fits both sides of the pairs best.

        Raises:
            RecipeError: there is too little text for so many pieces.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text for pair in pairs for text in pair),
                model_writer=model,
                model_type="unigram",
                vocab_size=size,
                character_coverage=1.0,
                normalization_rule_name="nmt_nfkc",
                minloglevel=2,
            )
        except RuntimeError as error:
            raise RecipeError(f"no vocabulary of {size} from this data: {' '.join(str(error).split())}") from error
        return cls(model.getvalue())

    @property
    def size(self) -> int:
        """Number of ids. SentencePiece's three special pieces make room for MarianMT's three."""
        size: int = self._pieces.get_piece_size()
        return size

    @property
    def pad(self) -> int:
        """The last id, which also starts the decoder."""
        return self.size - 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, ending with `</s>`."""
        # SentencePiece numbers <unk> <s> </s> 0 1 2 and yields only the first of them from text: the others shift by 1.
        return [[*(i - 1 if i else UNK for i in ids), EOS] for ids in self._pieces.encode(list(texts))]

    def write(self, folder: Path) -> None:
        """Write the tokenizer files of a MarianMT folder."""
        for side in ("source", "target"):
            (folder / f"{side}.spm").write_bytes(self._model)
        pieces = [self._pieces.id_to_piece(i) for i in range(3, self.size)]
        ids = {piece: i for i, piece in enumerate(["</s>", "<unk>", *pieces, "<pad>"])}
        _write_json(folder / "vocab.json", ids)
        settings = {"source_lang": "fra", "target_lang": "eng", "model_max_length": MAX_POSITIONS}
        settings |= {"tokenizer_class": "MarianTokenizer", "separate_vocabs": False}
        settings |= {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
        _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# --- Batches ---------------------------------------------------------------------------------------------------------


def make_examples(pairs: Sequence[Pair], vocabulary: Vocabulary) -> list[Example]:
    """The pairs as ids, without those that are too long on either side.

    Raises:
        RecipeError: that leaves none.
    """
    sources = vocabulary.encode([source for source, _ in pairs])
    targets = vocabulary.encode([target for _, target in pairs])
    examples = [e for e in zip(sources, targets, strict=True) if longest_side(e) <= MAX_TOKENS]
    if not examples:
        raise RecipeError(f"every sentence pair has more than {MAX_TOKENS} tokens on a side")
    return examples


def longest_side(example: Example) -> int:
    """Tokens that the example's longer side takes."""
    return max(map(len, example))


def make_batches(examples: Sequence[Example], budget_tokens: int, rng: random.Random) -> list[list[Example]]:
    """One epoch in random order; each batch holds examples of like length, at most `budget_tokens` padded ones."""
    batches: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda e: (longest_side(e), rng.random())):
        if batches[-1] and (len(batches[-1]) + 1) * longest_side(example) > budget_tokens:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def endless_batches(examples: Sequence[Example], budget_tokens: int, rng: random.Random) -> Iterator[list[Example]]:
    """Epoch after epoch, each in a new order."""
    while True:
        yield from make_batches(examples, budget_tokens, rng)


def padded(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
    """The rows as one array (B, longest)."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)


# --- Training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the arithmetic happens and whether matrix products are done in bfloat16."""

    device: torch.device
    bf16: bool

    def autocast(self) -> torch.autocast:
        """The context of a forward pass; weights and gradients stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def find_machine(precision: str) -> Machine:
    """The GPU if there is one, else the CPU. `auto` is bfloat16 where the hardware has it: emulated, it is slow."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision != "auto":
        return Machine(device, bf16=precision == "bf16")
    if device.type == "cuda":
        return Machine(device, bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    abilities = torch.cpu.get_capabilities()
    return Machine(device, bf16=any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16")))


def new_model(recipe: Recipe, vocabulary: Vocabulary) -> Any:
    """A MarianMT model with random weights."""
    pad = vocabulary.pad
    config = MarianConfig(
        vocab_size=vocabulary.size,
        decoder_vocab_size=vocabulary.size,
        d_model=recipe.d_model,
        encoder_layers=recipe.encoder_layers,
        decoder_layers=recipe.decoder_layers,
        encoder_attention_heads=recipe.heads,
        decoder_attention_heads=recipe.heads,
        encoder_ffn_dim=recipe.feed_forward,
        decoder_ffn_dim=recipe.feed_forward,
        activation_function="relu",
        dropout=0.1,
        max_position_embeddings=MAX_POSITIONS,
        scale_embedding=True,
        static_position_embeddings=True,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=pad,
        eos_token_id=EOS,
        forced_eos_token_id=EOS,
        decoder_start_token_id=pad,
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(
        num_beams=4,
        max_length=recipe.max_output_tokens,
        early_stopping=True,
        bad_words_ids=[[pad]],
        pad_token_id=pad,
        eos_token_id=EOS,
        forced_eos_token_id=EOS,
        decoder_start_token_id=pad,
    )
    return model


@dataclass(frozen=True, slots=True)
class StageReport:
    """How a stage went: mean loss of its first and of its last tenth, and the loss on the validation pairs after it."""

    name: str
    steps: int
    first_loss: float
    last_loss: float
    valid_loss: float


@dataclass(frozen=True, slots=True)
class Trainer:
    """Trains one model in place."""

    model: Any
    vocabulary: Vocabulary
    machine: Machine
    valid: list[Example]
    budget_tokens: int
    rng: random.Random

    def run_stage(self, stage: Stage, pairs: Sequence[Pair]) -> StageReport:
        """Train for one stage, then measure the loss on the validation examples."""
        examples = make_examples(with_casual_share(pairs, stage.casual_share, self.rng), self.vocabulary)
        losses = self._optimize(stage, endless_batches(examples, self.budget_tokens, self.rng))
        tenth = max(1, len(losses) // 10)
        return StageReport(
            name=stage.name,
            steps=stage.steps,
            first_loss=sum(losses[:tenth]) / tenth,
            last_loss=sum(losses[-tenth:]) / tenth,
            valid_loss=self._valid_loss(),
        )

    def _optimize(self, stage: Stage, batches: Iterator[list[Example]]) -> list[float]:
        """The loss of every step."""
        optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), eps=1e-9, weight_decay=0.01)
        losses = []
        self.model.train()
        with tqdm(total=stage.steps, desc=stage.name, unit="step") as bar:
            for step in range(stage.steps):
                rate = stage.rate_at(step)
                losses.append(self._update(optimizer, rate, next(batches)))
                bar.set_postfix(loss=f"{losses[-1]:.3f}", rate=f"{rate:.2e}", refresh=False)
                bar.update()
        return losses

    def _update(self, optimizer: torch.optim.Optimizer, rate: float, batch: Sequence[Example]) -> float:
        """One step of the optimizer; the loss before it."""
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves this method without annotations
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        return loss.item()

    def _loss(self, batch: Sequence[Example]) -> torch.Tensor:
        """Label-smoothed cross-entropy, averaged over the target tokens; a scalar."""
        pad = self.vocabulary.pad
        source = padded([source for source, _ in batch], pad).to(self.machine.device)  # (B, S)
        labels = padded([target for _, target in batch], IGNORED).to(self.machine.device)  # (B, T)
        with self.machine.autocast():
            logits: torch.Tensor = self.model(
                input_ids=source,
                attention_mask=source.ne(pad).long(),
                decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
            ).logits  # (B, T, vocabulary)
        flat = logits.float().flatten(0, 1)  # the sum over the vocabulary wants fp32
        return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING)

    @torch.no_grad()
    def _valid_loss(self) -> float:
        """The loss over all target tokens of the validation examples, without dropout."""
        self.model.eval()
        total, tokens = 0.0, 0
        for batch in make_batches(self.valid, self.budget_tokens, self.rng):
            size = sum(len(target) for _, target in batch)
            total += self._loss(batch).item() * size
            tokens += size
        return total / tokens


def train(corpus: Corpus, recipe: Recipe, machine: Machine, folder: Path, *, seed: int) -> list[StageReport]:
    """Run the recipe and write the MarianMT folder."""
    torch.manual_seed(seed)
    vocabulary = Vocabulary.learn(corpus.train, recipe.vocabulary)
    model = new_model(recipe, vocabulary).to(machine.device)
    valid = make_examples(corpus.valid, vocabulary)
    trainer = Trainer(model, vocabulary, machine, valid, recipe.batch_tokens, random.Random(seed))
    reports = [trainer.run_stage(stage, corpus.train) for stage in recipe.stages]
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # is written for its owner only, but a server is another user
    vocabulary.write(folder)
    return reports


# --- Evaluation ------------------------------------------------------------------------------------------------------


def translate(folder: Path, sources: Sequence[str], machine: Machine) -> list[str]:
    """Translations by the model of a MarianMT folder as it stands on disk, in fp32, with its own search settings."""
    with warnings.catch_warnings():
        # Moses punctuation is for models trained on text that went through it; this recipe's did not.
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        tokenizer = MarianTokenizer.from_pretrained(folder)
    model = MarianMTModel.from_pretrained(folder).to(machine.device).eval()
    translations: dict[str, str] = {}
    by_length = sorted(set(sources), key=lambda text: (len(text), text))
    for start in tqdm(range(0, len(by_length), TRANSLATED_TOGETHER), desc="test", unit="batch"):
        texts = by_length[start : start + TRANSLATED_TOGETHER]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(machine.device)
        outputs = tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
        translations |= zip(texts, outputs, strict=True)
    return [translations[source] for source in sources]


def score(folder: Path, test: Sequence[Pair], machine: Machine) -> dict[str, float]:
    """BLEU against all references of each source, chrF against the first."""
    references: dict[str, list[str]] = {}
    for source, reference in test:
        references.setdefault(source, []).append(reference)
    hypotheses = translate(folder, list(references), machine)
    most = max(map(len, references.values()))
    streams = [[r[i] if i < len(r) else None for r in references.values()] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(hypotheses, streams).score
    return {"bleu": round(bleu, 1), "chrf": round(sacrebleu.corpus_chrf(hypotheses, streams[:1]).score, 1)}


# --- Command line ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is there for `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _whole_number(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} on")
        return int(text)

    return parse


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a bad one ends the program with status 2."""
    parser = _Parser(prog="train.py", description="Train a small French-English MarianMT model.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="folder of train.tsv.gz, valid.tsv.gz, test.tsv.gz")
    source.add_argument("--smoke", action="store_true", help="a toy model from the sentences next to this script")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", required=True, help="folder to make")
    parser.add_argument("--seed", type=_whole_number(0), default=1, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=_whole_number(1), help="length of the first stage; the second keeps its proportion"
    )
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default: %(default)s")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Train, write the output folder, measure; the report."""
    started = time.monotonic()
    output: Path = options.output
    if output.exists():
        raise RecipeError(f"{output}: exists already")
    corpus = smoke_corpus() if options.smoke else read_corpus(options.data)
    recipe = SMOKE if options.smoke else FULL
    if options.steps:
        recipe = recipe.with_steps(options.steps)
    machine = find_machine(options.precision)
    with _made_whole(output) as folder:
        reports = train(corpus, recipe, machine, folder, seed=options.seed)
    return {
        "output": str(output),
        "device": machine.device.type,
        "precision": "bf16" if machine.bf16 else "fp32",
        "stages": [asdict(report) for report in reports],
        **score(output, corpus.test, machine),
        "seconds": round(time.monotonic() - started),
    }


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `output` if the block succeeds: the model appears complete or not at all."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise RecipeError(f"{output}: {error.strerror or error}") from error
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes it private
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    options = parse_arguments(arguments)
    try:
        report = run(options)
    except RecipeError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sys.exit(main())
