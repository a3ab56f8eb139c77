"""CTranslate2 behind Beamline's own gRPC service, with dynamic batching in front: what `online.py` compares with.

    python benchmarks/ct2_service.py BUNDLE --ct2-model FOLDER --request-batch 32 --request-batch-delay-ms 5

Takes the settings of `beamline serve`, of which some are meaningless here. The bundle gives tokenizer, limits and
defaults; FOLDER is the same checkpoint, written by ct2_convert.py. Needs `ctranslate2`.

Searches are CTranslate2's: one ends when as many hypotheses as the beam is wide are complete (`patience=1`), which is
early stopping `WHEN_FULL`; other rules are refused. Log-probabilities of tokens are not told.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_batching import DynamicBatching, Limits, Translate
from prometheus_client import disable_created_metrics

from beamline_server import app, logs
from beamline_server.bundle import Bundle
from beamline_server.engine.admission import RequestLevel
from beamline_server.engine.observer import StepObserver
from beamline_server.engine.request import (
    Deliver,
    EarlyStopping,
    Finish,
    Hypothesis,
    LengthPenaltyKind,
    SearchOptions,
)
from beamline_server.models.load import usable_cores
from beamline_server.settings import Settings, SettingsError, read_command

COMPUTE_TYPES = {"fp32": "float32", "int8": "int8"}
"""By the precision of a bundle."""


class Vocabulary:
    """Token ids and the pieces that CTranslate2 knows them by.

    Args:
        pieces: By id.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces
        self._ids: Mapping[str, int] = {piece: number for number, piece in enumerate(pieces)}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces of ids."""
        return [self._pieces[number] for number in ids]

    def ids(self, pieces: Sequence[str]) -> tuple[int, ...]:
        """The ids of pieces."""
        return tuple(self._ids[piece] for piece in pieces)


def search_arguments(options: SearchOptions) -> dict[str, Any]:
    """A search as `Translator.translate_batch` wants it.

    Raises:
        ValueError: CTranslate2 has no such search.
    """
    if options.early_stopping is not EarlyStopping.WHEN_FULL:
        raise ValueError(f"CTranslate2 has no early stopping like {options.early_stopping.value}")
    if options.length_penalty_kind is not LengthPenaltyKind.POWER:
        raise ValueError(f"CTranslate2 has no length penalty like {options.length_penalty_kind.value}")
    return {
        "beam_size": options.beam_size,
        "num_hypotheses": options.n_best,
        "patience": 1,
        "length_penalty": options.length_penalty,
        "min_decoding_length": options.min_new_tokens,
        "max_decoding_length": options.max_new_tokens,
        "max_input_length": 0,
        "return_scores": True,
        "return_end_token": True,
    }


def hypotheses(result: Any, vocabulary: Vocabulary, eos: Sequence[int]) -> tuple[Hypothesis, ...]:
    """A `TranslationResult`, best first; the log-probabilities of its tokens, which nobody knows, are nan."""
    answers = []
    for pieces, score in zip(result.hypotheses, result.scores, strict=True):
        tokens = vocabulary.ids(pieces)
        finish = Finish.END_OF_SEQUENCE if tokens and tokens[-1] in eos else Finish.LENGTH
        answers.append(Hypothesis(tokens, score, (float("nan"),) * len(tokens), finish))
    return tuple(answers)


@dataclass(frozen=True, slots=True)
class Translator:
    """A `Translate` over a `ctranslate2.Translator`, whose calls leave the GIL alone."""

    translator: Any
    vocabulary: Vocabulary
    eos: Sequence[int]

    def __call__(self, sources: Sequence[tuple[int, ...]], options: SearchOptions) -> Sequence[tuple[Hypothesis, ...]]:
        """See `Translate`."""
        pieces = [self.vocabulary.pieces(source) for source in sources]
        results = self.translator.translate_batch(pieces, **search_arguments(options))
        return [hypotheses(result, self.vocabulary, self.eos) for result in results]


@dataclass(frozen=True, slots=True)
class Build:
    """Builds CTranslate2 in place of Beamline's engine; an `app.BuildEngine`.

    Attributes:
        model: The converted model.
        part: Sentences that are translated at once, those of similar lengths together; None is the whole batch.
    """

    model: Path
    part: int | None

    def __call__(
        self, bundle: Bundle, settings: Settings, *, deliver: Deliver, observer: StepObserver
    ) -> app.BuiltEngine:
        """See `app.BuildEngine`."""
        import ctranslate2

        del observer
        batching = app.admission(settings)
        if not isinstance(batching, RequestLevel):
            raise SettingsError(["request_batch, request_batch_delay_ms: missing; CTranslate2 has no other batching"])
        workers = settings.workers if isinstance(settings.workers, int) else usable_cores()
        threads = settings.threads_per_worker if isinstance(settings.threads_per_worker, int) else 1
        translate = Translator(
            ctranslate2.Translator(
                str(self.model),
                device="cpu",
                inter_threads=workers,
                intra_threads=threads,
                compute_type=COMPUTE_TYPES[bundle.manifest.precision],
            ),
            Vocabulary(json.loads((self.model / "shared_vocabulary.json").read_text("utf-8"))),
            bundle.manifest.special_tokens.eos,
        )
        row_capacity = workers * settings.max_rows
        engine = DynamicBatching(
            translate,
            batching,
            part=self.part,
            workers=workers,
            limits=Limits(
                row_capacity + settings.max_queue_rows, row_capacity, bundle.manifest.dimensions.max_source_tokens
            ),
            deliver=deliver,
        )
        return app.BuiltEngine(engine, "cpu", lambda: warm_up(translate, bundle, batching.max_batch))


def warm_up(translate: Translate, bundle: Bundle, max_batch: int) -> None:
    """Translate a full batch once, so that the first requests find memory allocated and kernels chosen."""
    source = bundle.manifest.golden[0].source
    translate([source] * max_batch, SearchOptions(4, early_stopping=EarlyStopping.WHEN_FULL, max_new_tokens=16))


async def serve(argv: Sequence[str], build: Build) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status of `beamline serve`."""
    command, stop = read_command(argv, {}), app.StopRequests()
    logs.configure(command.settings.log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.notify)
    return await app.run(command, build=build, stop=stop)


def main() -> int:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ct2-model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--part", type=int, metavar="N", help="translate N sentences of similar lengths at once")
    parser.add_argument("--isa", help="instruction set that CTranslate2 is to use, such as AVX512; default: its choice")
    arguments, settings = parser.parse_known_args()
    if arguments.isa is not None:
        os.environ["CT2_FORCE_CPU_ISA"] = arguments.isa
    disable_created_metrics()  # type: ignore[no-untyped-call]  # has no type information
    try:
        return asyncio.run(serve(settings, Build(arguments.ct2_model, arguments.part)))
    except SettingsError as error:
        sys.stderr.writelines(f"ct2_service: {problem}\n" for problem in error.problems)
        return app.EXIT_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
