"""A server with a bundle of 4-bit weights: its answers are those of the engine, whoever asks beside."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from beamline_client import Client, SearchOptions
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.testing import write_hugging_face
from beamline_server.process import ServerProcess


def test_a_bundle_of_four_bits_is_served(tmp_path: Path) -> None:
    checkpoint = write_hugging_face(tmp_path / "checkpoint", "marian", {}, {}, sharpness=0.5)
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions("int4"), Progress(io.StringIO()))
    with ServerProcess(bundle.path) as server:
        server.wait_until_serving()
        with Client(server.target) as client:
            assert client.info().model.precision == "int4"
            # One source of one token, whose encoder call and greedy steps have one row each.
            sources = [[1], [5, 1], *([7 + i, 20 + i, 30, 1] for i in range(9))]
            search = SearchOptions(beam_size=1, max_new_tokens=8)
            alone = [client.generate_one(source, search=search).best for source in sources]
            with ThreadPoolExecutor(len(sources)) as callers:
                answers = callers.map(lambda source: client.generate_one(source, search=search).best, sources)
                assert [(a.token_ids, a.score) for a in answers] == [(a.token_ids, a.score) for a in alone]
        assert server.stop() == 0
