"""What is made before anything is measured: checkpoints, bundles, converted models, sentences.

Everything lies in one folder and is made anew only when what it was made from has changed.
"""

import gzip
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beamline_server.bundle import load_bundle
from beamline_server.tokenizer import Tokenizer, load_tokenizer
from offline.contender_process import BENCHMARKS, ContenderFailed, environment, last_words
from offline.contenders import Contender
from offline.models import EOS, FR_EN, RANDOM_SENTENCES, RANDOM_TOKENS, VOCABULARIES
from offline.task import Sentence, write_sentences

REPOSITORY = BENCHMARKS.parent


@dataclass(frozen=True, slots=True)
class Pythons:
    """Interpreters of the environments."""

    own: Path
    peers: Path
    optimum: Path

    def of(self, kind: str) -> Path:
        """The one for a kind of worker."""
        if kind.startswith("beamline"):
            return self.own
        return self.optimum if kind == "optimum" else self.peers


class Prepared:
    """The folder of what is made.

    Args:
        folder: Is created.
        pythons: What converts.
        say: Is told what is being made.
    """

    def __init__(self, folder: Path, pythons: Pythons, say: Callable[[str], None]) -> None:
        self._folder = folder
        self.pythons = pythons
        self._say = say
        folder.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, model: str) -> Path:
        """The model as transformers read it."""
        if model == FR_EN:
            return REPOSITORY / "models" / "fr-en"
        script = BENCHMARKS / "random_model.py"
        target = self._folder / _plain(model)
        arguments = ["--vocabulary", str(VOCABULARIES[model])]
        self._make(
            target, _digest([script]), [str(self.pythons.own), str(script), "-o", str(target), *arguments], model
        )
        return target

    def model(self, contender: Contender, model: str) -> Path:
        """The model as a contender reads it.

        Raises:
            ContenderFailed: it could not be made.
        """
        checkpoint = self.checkpoint(model)
        if contender.kind == "transformers":
            return checkpoint
        made_from = [checkpoint / "config.json", checkpoint / "model.safetensors"]
        if contender.ours:
            tool, options = "beamline", dict(contender.export)
            for package in ("export/beamline_export", "server/beamline_server"):
                made_from += sorted((REPOSITORY / package).rglob("*.py"))
        else:
            tool = contender.kind
            made_from += [BENCHMARKS / "offline" / "convert.py", BENCHMARKS / "ct2_convert.py"]
            options = {"quantization": "int8" if contender.precision == "int8" else "float32"}
        python = self.pythons.of(contender.kind)
        words = "-".join(f"{value}" for _, value in sorted(options.items()))
        target = self._folder / _plain(f"{model} {tool} {words}")
        command = [str(python), "-m", "offline.convert", tool, str(checkpoint), str(target), json.dumps(options)]
        made_from += sorted(BENCHMARKS.glob("requirements*.txt"))
        self._make(target, _digest(made_from, str(python)), command, f"{model} for {contender.name}")
        return target

    def spec(self, contender: Contender, model: str) -> dict[str, Any]:
        """For `worker.make_translator`.

        Raises:
            ContenderFailed: the model could not be made.
        """
        return {
            "kind": contender.kind,
            "precision": contender.precision,
            "model": str(self.model(contender, model)),
            "vocabulary": str(self.checkpoint(model) / "vocab.json"),
        }

    def sentences(self, model: str, bundle: Path) -> Path:
        """File of the model's sentences: the test file of the embedded model, random tokens for a random one."""
        target = self._folder / f"{_plain(model)}.sentences.json"
        names = _names(self.checkpoint(model))
        if model == FR_EN:
            tokenizer = tokenizer_of(bundle)
            found = [_named(tokenizer.encode(source), names, source) for source, *_ in fr_en_lines()]
        else:
            found = [_named(ids, names, None) for ids in _random_ids(len(names))]
        write_sentences(target, found)
        return target

    def _make(self, target: Path, made_from: str, command: list[str], what: str) -> None:
        stamp = target.with_name(f"{target.name}.made-from")
        if target.exists() and stamp.exists() and stamp.read_text("utf-8") == made_from:
            return
        self._say(f"making {what}")
        shutil.rmtree(target, ignore_errors=True)
        # PyTorch's threads spin while they wait, unless told not to.
        variables = {**environment(), "OMP_WAIT_POLICY": "PASSIVE"}
        try:
            subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        except OSError as error:
            raise ContenderFailed(f"{type(error).__name__}: its environment is not there") from error
        except subprocess.CalledProcessError as error:
            raise ContenderFailed(last_words(error.stderr)) from error
        stamp.write_text(made_from, "utf-8")


def tokenizer_of(bundle: Path) -> Tokenizer:
    """The tokenizer of a bundle that has one."""
    tokenizer = load_tokenizer(load_bundle(bundle))
    assert tokenizer is not None
    return tokenizer


def fr_en_lines() -> list[list[str]]:
    """Source and references of every test sentence of the embedded model."""
    with gzip.open(REPOSITORY / "models" / "fr-en" / "test.tsv.gz", "rt", encoding="utf-8") as stream:
        return [line.rstrip("\n").split("\t") for line in stream]


def own_python() -> Path:
    """The interpreter that runs this."""
    return Path(sys.executable)


def _names(checkpoint: Path) -> list[str]:
    vocabulary: dict[str, int] = json.loads((checkpoint / "vocab.json").read_text("utf-8"))
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _named(ids: list[int], names: list[str], text: str | None) -> Sentence:
    return Sentence(tuple(ids), tuple(names[i] for i in ids), text)


def _random_ids(vocabulary: int) -> Iterator[list[int]]:
    """Neither end of sequence, nor unknown, nor padding but at the end."""
    rng = np.random.default_rng(0)
    for _ in itertools.repeat(None, RANDOM_SENTENCES):
        yield [*(int(i) for i in rng.integers(2, vocabulary - 1, RANDOM_TOKENS - 1)), EOS]


def _plain(name: str) -> str:
    return name.lower().replace(" ", "-").replace("/", "-")


def _digest(files: list[Path], *words: str) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
