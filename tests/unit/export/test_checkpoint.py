"""Foreign checkpoints are read without being trusted."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from beamline_export.checkpoint import MOST_BYTES, MOST_TENSORS, Fields, read_json, read_state_dict
from beamline_export.renamer import Renamer
from beamline_export.spec import ExportError


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain-pickle"])
@pytest.mark.parametrize("file", ["model.pt", "pytorch_model.bin"])
def test_code_in_a_pickle_is_not_run(file: str, legacy: bool, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    state = {"src_embed.weight": torch.ones(2, 2), "trap": Trap(marker)}
    if legacy:
        (tmp_path / file).write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, tmp_path / file)
    with pytest.raises(ExportError, match="none of its code was run") as caught:
        read_state_dict(tmp_path)
    assert not marker.exists()
    assert file in str(caught.value)
    assert "weights_only" not in str(caught.value), "PyTorch's advice would run the code"


def test_the_trap_would_have_worked(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"abc", id="garbage"),
        pytest.param((1 << 40).to_bytes(8, "little") + b"{}", id="endless-header"),
        pytest.param(b"PK\x03\x04" + bytes(100), id="broken-zip"),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_a_broken_weights_file_is_named(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ExportError, match=file):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_a_truncated_weights_file_is_named(file: str, tmp_path: Path) -> None:
    state = {"weight": torch.ones(64, 64)}
    if file == "model.pt":
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=rf"{file} cannot be read as a weights file .*; download or save it again"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        pytest.param([torch.ones(2)], "holds a list, not a state dict", id="list"),
        pytest.param(torch.ones(2), "holds a Tensor, not a state dict", id="tensor"),
        pytest.param({"net": {"w": torch.ones(2)}, "epoch": 3}, r"\(net is a dict; epoch is a int\)", id="nested"),
        pytest.param({"w": torch.eye(3).to_sparse()}, "w is no plain tensor", id="sparse"),
        pytest.param({"w": torch.ones(2, dtype=torch.complex64)}, "w is no plain tensor", id="complex"),
        pytest.param({"w": torch.ones(3, device="meta")}, "w is no plain tensor", id="meta"),
        pytest.param({"w": torch.zeros(1).expand(10**12)}, "w is larger than what the file holds", id="inflated"),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_only_plain_tensors_are_accepted(saved: Any, problem: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(ExportError, match=problem):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model"])
def test_a_state_dict_within_what_a_training_loop_saves(name: str, tmp_path: Path) -> None:
    state = {"model.w": torch.ones(2), "model.v": torch.zeros(1)}
    torch.save({name: state, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "model.pt")
    assert read_state_dict(tmp_path).keys() == state.keys()
    torch.save({name: {"w": 3}, "epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(ExportError, match=r"\(w is a int\)"):
        read_state_dict(tmp_path)


def zipped(file: Path, compression: int, rename: Callable[[str], list[str]]) -> None:
    """Write an archive anew, each of its records under these names."""
    content = {}
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            for new in rename(name):
                archive.writestr(new, data)


def test_an_archive_that_is_not_compressed_is_read_whoever_wrote_it(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0)}, tmp_path / "model.pt")
    zipped(tmp_path / "model.pt", zipfile.ZIP_STORED, lambda name: [name])
    assert read_state_dict(tmp_path)["a"].tolist() == list(range(6))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "model.pt")
    zipped(tmp_path / "model.pt", zipfile.ZIP_DEFLATED, lambda name: [name])
    with pytest.raises(ExportError, match=r"model\.pt: .* in it is compressed, .*; save it again with torch\.save"):
        read_state_dict(tmp_path)


def test_numbers_that_are_in_many_tensors_are_not_copied_without_end(tmp_path: Path) -> None:
    numbers = torch.zeros(1 << 16, dtype=torch.int8)
    torch.save({str(i): numbers[i:] for i in range(100)}, tmp_path / "model.pt")
    with pytest.raises(ExportError, match=r"holds the same numbers in many tensors, more than 8 times its size"):
        read_state_dict(tmp_path)
    torch.save({str(i): numbers[i:] for i in range(2)}, tmp_path / "model.pt")
    assert len(read_state_dict(tmp_path)) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([str(i) for i in range(MOST_TENSORS + 1)], "holds 65,537 tensors, more than any model has"),
        (["x" * 1001], "holds a tensor with a name of 1,001 characters"),
    ],
    ids=["many", "long"],
)
def test_more_names_than_a_model_has_are_refused(names: list[str], problem: str, file: str, tmp_path: Path) -> None:
    state = dict.fromkeys(names, torch.ones(1))
    if file == "model.pt":
        torch.save(state, tmp_path / file)
    else:
        (tmp_path / file).write_bytes(save({name: torch.ones(0) for name in state}))
    with pytest.raises(ExportError, match=problem):
        read_state_dict(tmp_path)


def test_numbers_that_do_not_become_fp32_are_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"model\.safetensors: w cannot be read as fp32 .*; save it in fp32 or fp16"):
        read_state_dict(tmp_path)


KINDS: list[Any] = [
    pytest.param(os.mkfifo, "a pipe", id="pipe"),
    pytest.param(os.mkdir, "a folder", id="folder"),
    pytest.param(lambda file: file.symlink_to("/dev/zero"), "a device", id="device"),
]


@pytest.mark.parametrize(("make", "kind"), KINDS)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_what_is_no_file_is_not_opened(file: str, make: Callable[[Path], None], kind: str, tmp_path: Path) -> None:
    make(tmp_path / file)
    with pytest.raises(ExportError, match=rf"{file} is {kind}, not a file; put a file in its place"):
        read_state_dict(tmp_path)


def test_a_shard_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    os.mkfifo(tmp_path / "one.safetensors")
    with pytest.raises(ExportError, match=r"one\.safetensors is a pipe"):
        read_state_dict(tmp_path)


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(ExportError, match=r"model\.safetensors cannot be read as a weights file"):
        read_state_dict(tmp_path)


def test_a_config_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    with pytest.raises(ExportError, match=r"config\.json has 67,108,865 bytes, more than any such file needs"):
        read_json(tmp_path / "config.json")


def test_every_float_type_becomes_fp32(tmp_path: Path) -> None:
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    torch.save(
        {str(t): torch.nn.Parameter(torch.ones(2, 3).to(t), requires_grad=False) for t in types}, tmp_path / "model.pt"
    )
    state = read_state_dict(tmp_path)
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}
    assert all((array == 1).all() for array in state.values())


def test_parameters_that_want_gradients_are_read(tmp_path: Path) -> None:
    torch.save(dict(torch.nn.Linear(2, 2).named_parameters()), tmp_path / "model.pt")
    assert set(read_state_dict(tmp_path)) == {"weight", "bias"}


def test_tied_tensors_stay_one_array_and_views_do_not(tmp_path: Path) -> None:
    square = torch.arange(9.0).reshape(3, 3)
    torch.save({"a": square, "b": square, "transposed": square.T, "row": square[0]}, tmp_path / "model.pt")
    state = read_state_dict(tmp_path)
    assert state["a"] is state["b"]
    assert (state["transposed"] == square.T.numpy()).all()
    assert state["row"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_put_together(stem: str, tmp_path: Path) -> None:
    parts = {"one": {"a": torch.ones(2), "b": torch.zeros(2)}, "two": {"c": torch.ones(3)}}
    for name, part in parts.items():
        file = tmp_path / f"{name}{Path(stem).suffix}"
        if stem.endswith("bin"):
            torch.save(part, file)
        else:
            save_file(part, file)
    names = {tensor: f"{name}{Path(stem).suffix}" for name, part in parts.items() for tensor in part}
    (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": names}))
    assert set(read_state_dict(tmp_path)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "weight_map", [{"a": "../secret"}, {"a": "/etc/passwd"}, {"a": ""}, {"a": 3}, {"a": ["x"]}, [], "x", None]
)
def test_an_index_cannot_lead_outside(weight_map: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ExportError, match=r"index\.json"):
        read_state_dict(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ExportError, match=r"gone\.safetensors cannot be read"):
        read_state_dict(tmp_path)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert read_state_dict(tmp_path)["a"].tolist() == load_file(tmp_path / "model.safetensors")["a"].tolist()


def test_a_folder_without_weights_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"one of model\.safetensors, pytorch_model\.bin, model\.pt is expected"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is missing"),
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
    ids=["absent", "empty", "cut", "encoding", "deep", "long-number", "list", "null"],
)
def test_a_config_that_is_none_is_named(content: bytes | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ExportError, match=rf"config\.json {problem}"):
        read_json(tmp_path / "config.json")


def test_fields_tell_all_problems_at_once() -> None:
    fields = Fields(
        {"a": "1", "b": 0, "c": float("inf"), "d": "yes", "e": ["x"], "f": 2, "g": [[1, "2"]]}, "config.json"
    )
    fields.integer("a")
    fields.integer("b")
    fields.integer("missing")
    fields.number("c", 1.0)
    fields.flag("d", False)
    fields.choice("e", {"x": 1, "y": 2})
    fields.must_be("f", 1)
    fields.id_sequences("g")
    with pytest.raises(ExportError) as caught:
        fields.check()
    assert str(caught.value).split("; ") == [
        "config.json: a must be a whole number from 1 to 16777216, not '1'",
        "b must be a whole number from 1 to 16777216, not 0",
        "missing is missing",
        "c must be a number from -1e+30 to 1e+30, not inf",
        "d must be true or false, not 'yes'",
        "e ['x'] is not known (known: x, y)",
        "f 2 is not supported (only 1 is)",
        "g must be a list of lists of token ids, not [[1, '2']]",
    ]


def test_a_null_is_an_absent_value() -> None:
    fields = Fields(dict.fromkeys("abcde"), "config.json")
    assert fields.integer("a", 3) == 3
    assert fields.number("b", 0.5) == 0.5
    assert fields.flag("c", True) is True
    assert fields.optional_id("d") is None
    assert fields.ids("e") == ()
    fields.check()


def test_long_values_are_cut_in_messages() -> None:
    fields = Fields({"a": "x" * 10_000}, "config.json")
    fields.integer("a")
    assert len(fields.problems[0]) < 200


def test_names_without_number_are_told_in_bounds() -> None:
    fields = Fields({f"name_{i}": 1 for i in range(100_000)}, "config.json")
    fields.refuse_unasked({"named"})
    assert len(fields.problems) == 25
    assert fields.problems[-1] == "99976 more are not known"


def test_a_renamer_reports_what_it_did_not_take() -> None:
    names = Renamer({"w": np.ones((2, 2), np.float32), "extra": np.ones(1, np.float32)})
    names.module("linear", "w_module")
    names.take("linear.weight", "w")
    assert set(names.weights) == {"linear.weight"}
    assert names.foreign() == {"extra": "[1]"}
    assert names.names["linear.weight"] == "w"


def test_thirds_are_cut_and_missing_biases_are_zero() -> None:
    names = Renamer({"in_proj_weight": np.arange(12, dtype=np.float32).reshape(6, 2)})
    names.thirds(["q", "k", "v"], "in_proj_")
    assert names.weights["k.weight"].tolist() == [[4, 5], [6, 7]]
    assert names.weights["v.bias"].tolist() == [0, 0]


def test_equal_tables_become_one() -> None:
    a, b = np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)
    names = Renamer({"a": a, "b": b, "c": a + 1})
    for name in "abc":
        names.take(name, name)
    names.share_equal("a", "b", "c")
    assert names.weights["b"] is a
    assert names.weights["c"] is not a


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.pt", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_in_place_of_weights_is_told_as_one(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(LFS_POINTER)
    with pytest.raises(ExportError, match=rf"{file} is a Git LFS pointer.*run `git lfs pull`") as caught:
        read_state_dict(tmp_path)
    assert "save" not in str(caught.value)


def test_a_git_lfs_pointer_in_place_of_a_shard_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    (tmp_path / "one.safetensors").write_bytes(LFS_POINTER)
    with pytest.raises(ExportError, match=r"one\.safetensors is a Git LFS pointer"):
        read_state_dict(tmp_path)


def test_a_git_lfs_pointer_in_place_of_a_config_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(LFS_POINTER)
    with pytest.raises(ExportError, match=r"config\.json is a Git LFS pointer"):
        read_json(tmp_path / "config.json")


def test_single_numbers_have_no_dimension(tmp_path: Path) -> None:
    torch.save({"counter": torch.tensor(3), "view": torch.ones(3, 4).T}, tmp_path / "model.pt")
    state = read_state_dict(tmp_path)
    assert state["counter"].shape == ()
    assert state["view"].flags["C_CONTIGUOUS"]
