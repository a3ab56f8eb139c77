"""Beamline as a contender over gRPC: `beamline serve` on this machine, and a client that sends texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beamline_client import Client, SearchOptions
from beamline_client.results import EarlyStopping
from beamline_server.process import ServerProcess
from offline.task import Search, Sentence, Setting

READY_WITHIN_S = 120


class ServedTranslator:
    """A server process of a bundle. A setting has fields of the server's settings: workers, threads, …."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._bundle = Path(spec["model"])
        self._server: ServerProcess | None = None
        self._client: Client | None = None

    def open(self, setting: Setting) -> None:
        """As `Translator.open`."""
        flags = [word for name, value in setting.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        self._server = ServerProcess(self._bundle, *flags)
        self._server.wait_until_serving(within_s=READY_WITHIN_S)
        self._client = Client(self._server.target)

    def translate(self, sentences: Sequence[Sentence], search: Search) -> Sequence[Sequence[int]]:
        """As `Translator.translate`; tokenization included, for the server does it."""
        assert self._client is not None, "not open"
        options = SearchOptions(
            beam_size=search.beam,
            early_stopping=EarlyStopping.WHEN_FULL,
            length_penalty=1.0,
            min_new_tokens=search.min_new_tokens,
            max_new_tokens=search.max_new_tokens,
        )
        inputs = [sentence.ids if sentence.text is None else sentence.text for sentence in sentences]
        results = self._client.generate(inputs, search=options, token_ids=True)
        return [result.best.token_ids or () for result in results]

    def ids(self, tokens: Sequence[int]) -> list[int]:
        """As `Translator.ids`."""
        return list(tokens)

    def close(self) -> None:
        """As `Translator.close`."""
        assert self._client is not None, "not open"
        assert self._server is not None, "not open"
        self._client.close()
        with self._server:
            self._server.stop()
        self._client = self._server = None
