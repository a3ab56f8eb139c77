"""Where and how large: what every part of the measurement is told."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beamline_server.bundle import Bundle, load_bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.ort.cuda.backend import CudaBackend

REPOSITORY = Path(__file__).parents[2]
FR_EN = "fr-en"
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of everything that is measured."""

    embedded: bool
    """Whether the embedded model is measured; if not, a random one stands in for it."""
    vocabularies: tuple[int, ...]
    """Of the random models, the first of which everything is measured with."""
    layers: int
    width: int
    heads: int
    ffn: int
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    beams: int
    source_tokens: int
    new_tokens: int
    profile_rows: int
    parity_sentences: int
    parity_least_tokens: int
    file_sentences: int
    repetitions: int
    copy_mib: int
    online_s: int
    callers: int


FULL = Scale(
    embedded=True,
    vocabularies=(16_000, 58_000),
    layers=6,
    width=512,
    heads=8,
    ffn=2048,
    rows=(4, 16, 64, 128, 256, 512, 1024),
    batches=(1, 8, 32, 64, 256),
    beams=4,
    source_tokens=16,
    new_tokens=32,
    profile_rows=256,
    parity_sentences=96,
    parity_least_tokens=0,
    file_sentences=2037,
    repetitions=40,
    copy_mib=1024,
    online_s=10,
    callers=256,
)
TINY = Scale(
    embedded=False,
    vocabularies=(120, 200),
    layers=2,
    width=32,
    heads=4,
    ffn=48,
    rows=(4, 16),
    batches=(1, 2),
    beams=4,
    source_tokens=5,
    new_tokens=8,
    profile_rows=16,
    parity_sentences=12,
    parity_least_tokens=12,
    file_sentences=6,
    repetitions=3,
    copy_mib=1,
    online_s=1,
    callers=2,
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of the script.

    Attributes:
        device: cuda, or cpu for a dry run.
        out: Results of the parts go there, and other parts' results are read there.
        work: Checkpoints and bundles; what is there is used again.
        scale: Sizes.
    """

    device: str
    out: Path
    work: Path
    scale: Scale

    @property
    def names(self) -> tuple[str, ...]:
        """The models: the embedded one, then the random ones."""
        return (FR_EN, *(f"base-{vocabulary}" for vocabulary in self.scale.vocabularies))

    def checkpoint(self, name: str) -> Path:
        """A model's checkpoint."""
        return REPOSITORY / "models" / FR_EN if self.scale.embedded and name == FR_EN else self.work / name

    def bundle(self, name: str, precision: str) -> Bundle:
        """A bundle that the part `bundles` has made."""
        return load_bundle(self.work / f"{name}-{precision}")

    def backend(self, name: str, *, graphs: bool = True) -> CudaBackend:
        """The backend under measurement, of an fp16 bundle."""
        return CudaBackend(self.bundle(name, "fp16"), device=self.device, graphs=graphs)

    def reference(self) -> Backend:
        """The embedded model in fp32 on the CPU."""
        from beamline_server.engine.ort.cpu import CpuBackend
        from beamline_server.models.load import usable_cores

        return CpuBackend(self.bundle(FR_EN, "fp32"), threads=usable_cores())

    def sources(self) -> list[Tokens]:
        """Sentences for the embedded model as ids."""
        if not self.scale.embedded:
            return self.random_sources(self.scale.vocabularies[0], self.scale.file_sentences)
        from beamline_server.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.bundle(FR_EN, "fp16"))
        assert tokenizer is not None
        with gzip.open(self.checkpoint(FR_EN) / "test.tsv.gz", "rt", encoding="utf-8") as lines:
            return [tuple(tokenizer.encode(line.split("\t")[0])) for line in lines][: self.scale.file_sentences]

    def random_sources(self, vocabulary: int, count: int) -> list[Tokens]:
        """Sources of the usual length, of random ids."""
        import numpy as np

        rng = np.random.default_rng(0)
        ids = rng.integers(4, vocabulary, (count, self.scale.source_tokens)).tolist()
        return [tuple(source) for source in ids]

    def result(self, part: str) -> Any:
        """What another part has measured, or None."""
        try:
            return json.loads((self.out / f"{part}.json").read_text("utf-8"))
        except FileNotFoundError:
            return None

    def synchronize(self) -> None:
        """Wait for PyTorch's work on the device."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


def vocabulary_of(name: str, default: int) -> int:
    """The vocabulary that a random model's name tells."""
    return int(name.removeprefix("base-")) if name.startswith("base-") else default


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]
