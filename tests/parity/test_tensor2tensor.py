"""Checkpoints of Tensor2Tensor as NumPy archives, against the model's formulas written out here."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from doubles.formulas import attend, check_agreement, drawn, halves, normalized, save_npz

pytestmark = pytest.mark.parity

WIDTH, HEADS, INNER, SOURCE, TARGET = 16, 4, 24, 50, 61
OPTIONS = {
    "hidden_size": WIDTH,
    "num_heads": HEADS,
    "filter_size": INNER,
    "num_hidden_layers": 2,
    "num_encoder_layers": 0,
    "num_decoder_layers": 1,
    "layer_preprocess_sequence": "n",
    "layer_postprocess_sequence": "da",
    "norm_type": "layer",
    "norm_epsilon": 1e-6,
    "ffn_layer": "dense_relu_dense",
    "pos": "timing",
    "multiply_embedding_mode": "sqrt_depth",
    "self_attention_type": "dot_product",
    "causal_decoder_self_attention": True,
    "proximity_bias": False,
    "attention_key_channels": 0,
    "symbol_modality_num_shards": 16,
    "learning_rate": 0.2,
}
BODY = "transformer/body"
PARTS = {"encoder": ["self_attention"], "decoder": ["self_attention", "encdec_attention"]}
LAYERS = {"encoder": 2, "decoder": 1}
SHARED, APART = f"transformer/symbol_modality_{TARGET}_{WIDTH}/shared", "transformer/symbol_modality_{}_{}/{}"
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def norm(scope: str) -> Shapes:
    yield f"{scope}/layer_prepostprocess/layer_norm/layer_norm_scale", (WIDTH,)
    yield f"{scope}/layer_prepostprocess/layer_norm/layer_norm_bias", (WIDTH,)


def shapes_of(*, shared: bool, spaces: bool) -> Shapes:
    if shared:
        yield SHARED, (TARGET, WIDTH)
    else:
        yield APART.format(SOURCE, WIDTH, "input_emb"), (SOURCE, WIDTH)
        yield APART.format(TARGET, WIDTH, "target_emb"), (TARGET, WIDTH)
        yield APART.format(TARGET, WIDTH, "softmax"), (TARGET, WIDTH)
    if spaces:
        yield f"{BODY}/target_space_embedding/kernel", (32, WIDTH)
    for stack, layers in LAYERS.items():
        yield from norm(f"{BODY}/{stack}")
        for i in range(layers):
            layer = f"{BODY}/{stack}/layer_{i}"
            for part in PARTS[stack]:
                for kernel in ("q", "k", "v", "output_transform"):
                    yield f"{layer}/{part}/multihead_attention/{kernel}/kernel", (WIDTH, WIDTH)
                yield from norm(f"{layer}/{part}")
            yield f"{layer}/ffn/conv1/kernel", (WIDTH, INNER)
            yield f"{layer}/ffn/conv1/bias", (INNER,)
            yield f"{layer}/ffn/conv2/kernel", (INNER, WIDTH)
            yield f"{layer}/ffn/conv2/bias", (WIDTH,)
            yield from norm(f"{layer}/ffn")


class Model:
    """The model as Tensor2Tensor describes it: padding is embedded as zeros, and a target begins with it."""

    def __init__(self, options: dict[str, Any], state: dict[str, Tensor], space: int | None) -> None:
        self.state, self.space = state, space
        self.scale = math.sqrt(WIDTH) if options["multiply_embedding_mode"] == "sqrt_depth" else 1
        shared = state.get(SHARED)
        kinds = (("input_emb", SOURCE), ("target_emb", TARGET), ("softmax", TARGET))
        self.source, self.target, self.softmax = (
            shared if shared is not None else state[APART.format(rows, WIDTH, kind)] for kind, rows in kinds
        )

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.embedded(self.source, source)
        if self.space is not None:
            x = x + self.state[f"{BODY}/target_space_embedding/kernel"][self.space]
        memory = self.stack("encoder", x, None)
        return self.stack("decoder", self.embedded(self.target, target), memory) @ self.softmax.T

    def embedded(self, table: Tensor, ids: Tensor) -> Tensor:
        return table[ids] * self.scale * (ids != 0)[:, None] + halves(0, len(ids), WIDTH)

    def stack(self, name: str, x: Tensor, memory: Tensor | None) -> Tensor:
        for i in range(LAYERS[name]):
            layer = f"{BODY}/{name}/layer_{i}"
            for part in PARTS[name]:
                y = self.norm(f"{layer}/{part}", x)
                of = memory if memory is not None and part == "encdec_attention" else y
                scope = f"{layer}/{part}/multihead_attention"
                q, k, v = (what @ self.state[f"{scope}/{n}/kernel"] for n, what in (("q", y), ("k", of), ("v", of)))
                y = attend(q, k, v, HEADS, causal=name == "decoder" and part == "self_attention")
                x = x + y @ self.state[f"{scope}/output_transform/kernel"]
            y = self.norm(f"{layer}/ffn", x) @ self.state[f"{layer}/ffn/conv1/kernel"]
            y = (y + self.state[f"{layer}/ffn/conv1/bias"]).clamp(min=0)
            x = x + y @ self.state[f"{layer}/ffn/conv2/kernel"] + self.state[f"{layer}/ffn/conv2/bias"]
        return self.norm(f"{BODY}/{name}", x)

    def norm(self, scope: str, x: Tensor) -> Tensor:
        name = f"{scope}/layer_prepostprocess/layer_norm/layer_norm"
        return normalized(x, self.state[f"{name}_scale"], self.state[f"{name}_bias"], 1e-6)


def sharded(state: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """As in the file: tables in 16 parts, of which the first may have a row more; with what training adds."""
    saved: dict[str, np.ndarray[Any, Any]] = {"global_step": np.array(1000), "training/Adam/beta1": np.ones(3)}
    for name, tensor in state.items():
        if "symbol_modality" in name:
            parts = np.array_split(tensor.numpy(), 16)
            saved |= {f"{name}/weights_{i}": part for i, part in enumerate(parts)}
        else:
            saved[name] = tensor.numpy()
    return saved


def written(folder: Path, options: dict[str, Any], saved: dict[str, np.ndarray[Any, Any]], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "tensor2tensor", **config}))
    (folder / "hparams.json").write_text(json.dumps(options))
    save_npz(folder / "model.npz", saved)
    return folder


def exported(folder: Path, told: io.StringIO | None = None) -> Bundle:
    return export(folder, folder.with_name("bundle"), ExportOptions(), Progress(told or io.StringIO()))


@pytest.mark.parametrize(
    ("shared", "space", "mode"),
    [(True, None, "sqrt_depth"), (False, None, "rescale"), (True, 7, "sqrt_depth")],
    ids=["one-table", "separate", "target-space"],
)
def test_a_model_answers_as_by_its_formulas(shared: bool, space: int | None, mode: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "multiply_embedding_mode": mode}
    state = drawn(dict(shapes_of(shared=shared, spaces=space is not None)))
    bundle = exported(written(tmp_path / "model", options, sharded(state), max_positions=40, target_space_id=space))
    tokens = bundle.manifest.special_tokens
    assert (tokens.decoder_start, tokens.eos, tokens.pad, tokens.source_eos) == (0, (1,), 0, 1)
    assert bundle.manifest.dimensions.source_vocabulary == (TARGET if shared else SOURCE)
    check_agreement(bundle, Model(options, state, space), words=range(1, SOURCE))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layer_preprocess_sequence": "none"}, r"layer_preprocess_sequence 'none' is not supported \(only \"n\" is\)"),
        ({"layer_postprocess_sequence": "dan"}, "layer_postprocess_sequence 'dan' is not supported"),
        (
            {"self_attention_type": "dot_product_relative"},
            "self_attention_type 'dot_product_relative' is not supported",
        ),
        ({"ffn_layer": "conv_hidden_relu"}, "ffn_layer 'conv_hidden_relu' is not supported"),
        ({"pos": "none"}, "pos 'none' is not supported"),
        ({"attention_key_channels": 8}, "attention_key_channels 8 is not supported"),
        ({"num_heads": None}, "num_heads is missing"),
        ({"multiply_embedding_mode": "other"}, r"multiply_embedding_mode 'other' is not known \(known: sqrt_depth"),
        ({"num_decoder_layers": 2}, "missing: transformer/body/decoder/layer_1/|missing: decoder/layer_1/"),
        ({"filter_size": 32}, r"conv1/kernel has shape \[24, 16\], the config says \[32, 16\]"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    saved = sharded(drawn(dict(shapes_of(shared=True, spaces=False))))
    with pytest.raises(ExportError, match=problem) as told:
        exported(written(tmp_path / "model", {**OPTIONS, **changes}, saved))
    assert "\n" not in str(told.value)


def test_the_kind_of_the_target_must_be_told_where_the_model_knows_one(tmp_path: Path) -> None:
    saved = sharded(drawn(dict(shapes_of(shared=True, spaces=True))))
    for number in (None, 32):
        folder = written(tmp_path / f"model{number}", OPTIONS, saved, target_space_id=number)
        with pytest.raises(ExportError, match="target_space_id must be a number below 32"):
            exported(folder)
    plain = {name: array for name, array in saved.items() if "target_space" not in name}
    with pytest.raises(ExportError, match="target_space_id is 7, but the archive has no"):
        exported(written(tmp_path / "plain", OPTIONS, plain, target_space_id=7))


def test_shards_that_are_missing(tmp_path: Path) -> None:
    saved = sharded(drawn(dict(shapes_of(shared=True, spaces=False))))
    del saved[f"{SHARED}/weights_3"]
    with pytest.raises(ExportError, match=r"the shards of .*/shared/weights_\* are not all there"):
        exported(written(tmp_path / "model", OPTIONS, saved))
    saved = {name: array for name, array in saved.items() if "symbol_modality" not in name}
    with pytest.raises(ExportError, match=r"missing: .*symbol_modality"):
        exported(written(tmp_path / "other", OPTIONS, saved))


def test_heads_are_those_of_hparams(tmp_path: Path) -> None:
    """The comparison above tells them apart."""
    state = drawn(dict(shapes_of(shared=True, spaces=False)))
    bundle = exported(written(tmp_path / "model", {**OPTIONS, "num_heads": 2}, sharded(state)))
    with pytest.raises(AssertionError):
        check_agreement(bundle, Model(OPTIONS, state, None), words=range(1, SOURCE), count=3)
