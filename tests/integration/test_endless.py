"""A model that has no end of sequence: every answer has as many tokens as were asked for, and says so."""

import io
from collections.abc import Iterator

import pytest

from beamline_client import Client, FinishReason, Piece, Result, SearchOptions
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.testing import nn_config, write_nn_transformer
from beamline_server.bundle import Bundle
from beamline_server.process import ServerProcess


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of such a model; it takes token ids."""
    folder = tmp_path_factory.mktemp("endless")
    config = nn_config(eos_token_id=None, source_eos_token_id=None, generation={"num_beams": 3, "max_new_tokens": 9})
    checkpoint = write_nn_transformer(folder / "checkpoint", config)
    return export(checkpoint, folder / "bundle", ExportOptions(), Progress(io.StringIO()))


@pytest.fixture(scope="module")
def client(endless: Bundle) -> Iterator[Client]:
    with ServerProcess(endless.path) as server:
        server.wait_until_serving()
        with Client(server.target) as opened:
            yield opened


@pytest.mark.parametrize("width", [None, 1, 5])
@pytest.mark.parametrize("length", [None, 1, 20])
def test_every_answer_runs_to_its_length(width: int | None, length: int | None, client: Client) -> None:
    search = SearchOptions(beam_size=width, n_best=width, max_new_tokens=length)
    result = client.generate_one([5, 8, 13], search=search, token_ids=True)
    assert len(result.hypotheses) == (width or 1)
    for hypothesis in result.hypotheses:
        assert hypothesis.token_ids is not None
        assert len(hypothesis.token_ids) == (length or 9)
        assert hypothesis.finish_reason is FinishReason.LENGTH


def test_a_stream_gives_all_of_it(client: Client) -> None:
    *pieces, result = client.stream([5, 8, 13], token_ids=True)
    assert isinstance(result, Result)
    streamed = [token for piece in pieces if isinstance(piece, Piece) for token in piece.token_ids]
    assert tuple(streamed) == result.best.token_ids
    assert len(streamed) == 9
