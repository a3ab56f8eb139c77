"""A bundle's files under a server: how stores and volumes lay them out, and what becomes of one that changes."""

import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from beamline_client import Client
from beamline_server.bundle import Bundle
from beamline_server.process import ServerProcess


def answers(client: Client, texts: Sequence[str]) -> list[tuple[str, float]]:
    """Text and score of each, in requests of 64."""
    batches = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    return [(result.best.text, result.best.score) for batch in batches for result in client.generate(batch)]


def overwrite(file: Path) -> None:
    """As `cp` of another bundle does: in place."""
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)


def truncate(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(0)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("change", [overwrite, truncate, remove])
def test_a_served_bundle_may_change_in_place(
    change: Callable[[Path], None], fr_en_fp32: Bundle, sentences: list[str], tmp_path: Path
) -> None:
    """The server has loaded it: every answer stays right, those under way and those of sentences never asked before."""
    folder = Path(shutil.copytree(fr_en_fp32.path, tmp_path / "bundle"))
    texts = sentences[:192]
    with ServerProcess(fr_en_fp32.path) as untouched, Client(untouched.target) as client:
        untouched.wait_until_serving()
        expected = answers(client, texts)
    with ServerProcess(folder) as server, Client(server.target) as client:
        server.wait_until_serving()
        under_way: list[list[tuple[str, float]]] = []
        thread = threading.Thread(target=lambda: under_way.extend(answers(client, texts[:64]) for _ in range(8)))
        thread.start()
        for file in sorted(folder.iterdir()):
            change(file)
            assert answers(client, texts[:8]) == expected[:8]
        thread.join()
        assert under_way == [expected[:64]] * 8
        assert answers(client, texts) == expected
        assert server.stop() == 0


def as_in_the_hugging_face_cache(bundle: Path, root: Path) -> Path:
    """snapshots/REVISION/NAME -> ../../blobs/HASH; the snapshot itself is reached by a link as well."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in bundle.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blobs / digest)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", digest))
    (root / "main").symlink_to(snapshot, target_is_directory=True)
    return root / "main"


def as_in_a_config_map(bundle: Path, root: Path) -> Path:
    """NAME -> ..data/NAME, and ..data -> a folder with a time in its name."""
    shutil.copytree(bundle, root / "..2026_01_01_00_00_00.123")
    (root / "..data").symlink_to("..2026_01_01_00_00_00.123", target_is_directory=True)
    for file in bundle.iterdir():
        (root / file.name).symlink_to(Path("..data", file.name))
    return root


def as_on_a_fresh_volume(bundle: Path, root: Path) -> Path:
    shutil.copytree(bundle, root)
    (root / "lost+found").mkdir()
    (root / "notes.txt").write_text("who put this here")
    return root


@pytest.mark.parametrize(
    ("lay_out", "foreign"),
    [
        (as_in_the_hugging_face_cache, None),
        (as_in_a_config_map, None),
        (as_on_a_fresh_volume, ["lost+found", "notes.txt"]),
    ],
)
def test_bundles_are_served_where_stores_and_volumes_put_them(
    lay_out: Callable[[Path, Path], Path], foreign: list[str] | None, fr_en_int8: Bundle, tmp_path: Path
) -> None:
    """What does not belong to the bundle is told, and left alone."""
    folder = lay_out(fr_en_int8.path, tmp_path / "store")
    with ServerProcess(folder) as server, Client(server.target) as client:
        server.wait_until_serving()
        assert client.generate_one("je suis étudiant").best.text
        told = [(record["level"], record["files"]) for record in server.log.records("foreign_files")]
        assert told == ([] if foreign is None else [("warning", foreign)])
        assert server.stop() == 0
