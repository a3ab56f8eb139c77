"""The ratios that must not fall, and whether they have."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from offline.contenders import BEAMLINE_FP32, BEAMLINE_INT8, CTRANSLATE2_FP32, CTRANSLATE2_INT8
from offline.models import BASE_16K, FR_EN
from offline.ratios import Spread
from offline.task import Setting

LOSS_ALLOWED = 0.10
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Pair:
    """A ratio: how many times as fast one contender is as another.

    Attributes:
        title: What is compared.
        model: On which model.
        batch: Sentences that come at a time; None: all of them.
        ours: Beamline's contender.
        theirs: The peer.
    """

    title: str
    model: str
    batch: int | None
    ours: str
    theirs: str


PAIRS = (
    Pair("fr-en test file, int8 / CTranslate2 int8", FR_EN, None, BEAMLINE_INT8, CTRANSLATE2_INT8),
    Pair("fr-en test file, fp32 / CTranslate2 fp32", FR_EN, None, BEAMLINE_FP32, CTRANSLATE2_FP32),
    Pair("fr-en, one sentence at a time, int8 / CTranslate2 int8", FR_EN, 1, BEAMLINE_INT8, CTRANSLATE2_INT8),
    Pair("transformer-base 16k, batch 8, int8 / CTranslate2 int8", BASE_16K, 8, BEAMLINE_INT8, CTRANSLATE2_INT8),
)


@dataclass(frozen=True, slots=True)
class Record:
    """What was recorded.

    Attributes:
        about: Machine, date and commit.
        ratios: By title.
        settings: By title and contender: those that were found best then, and are used since.
    """

    about: Mapping[str, Any]
    ratios: Mapping[str, Spread]
    settings: Mapping[str, Mapping[str, Setting]]

    def as_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` has written.

        Raises:
            ValueError: it is in another format.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"the record is in format {data.get('format')}, not {FORMAT}: record anew")
        return cls(data["about"], {name: Spread(**value) for name, value in data["ratios"].items()}, data["settings"])


@dataclass(frozen=True, slots=True)
class Change:
    """A ratio now and as recorded; None where it was not recorded."""

    title: str
    now: Spread
    recorded: Spread | None

    @property
    def lost(self) -> bool:
        """Whether the median has fallen by more than is allowed."""
        return self.recorded is not None and self.now.median < (1 - LOSS_ALLOWED) * self.recorded.median

    def __str__(self) -> str:
        now = f"{self.title}: {self.now.median:.2f} ({self.now.low:.2f}-{self.now.high:.2f})"
        if self.recorded is None:
            return f"{now}, not recorded"
        change = self.now.median / self.recorded.median - 1
        return f"{now}, recorded {self.recorded.median:.2f}: {change:+.1%}{' LOST' if self.lost else ''}"


def changes(now: Mapping[str, Spread], recorded: Mapping[str, Spread]) -> Iterator[Change]:
    """Every ratio of now beside the record."""
    return (Change(title, value, recorded.get(title)) for title, value in now.items())
