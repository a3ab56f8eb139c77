"""Checkpoints in fairseq's layout, small and of random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doubles.formulas import drawn

WIDTH, HEADS, INNER, SOURCE, TARGET = 16, 4, 24, 60, 70
ARGS = {
    "arch": "transformer_iwslt_de_en",
    "source_lang": "de",
    "target_lang": "en",
    **{f"{side}_embed_dim": WIDTH for side in ("encoder", "decoder")},
    **{f"{side}_ffn_embed_dim": INNER for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_normalize_before": False,
    "decoder_normalize_before": False,
    "encoder_learned_pos": False,
    "decoder_learned_pos": False,
    "decoder_output_dim": WIDTH,
    "decoder_input_dim": WIDTH,
    "adaptive_softmax_cutoff": None,
    "max_source_positions": 40,
    "max_target_positions": 30,
    "encoder_layerdrop": 0.1,
    "lr": [0.0005],
}


ATTENTIONS = {"encoder": ["self_attn"], "decoder": ["self_attn", "encoder_attn"]}


def shapes_of(args: dict[str, Any], *, old: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as fairseq saves them; `old` is of 2018, with projections in one and numbered norms."""
    for stack, rows, side in (("encoder", SOURCE, "source"), ("decoder", TARGET, "target")):
        yield f"{stack}.embed_tokens.weight", (rows, WIDTH)
        if args.get(f"{stack}_learned_pos"):
            yield f"{stack}.embed_positions.weight", (2 + args[f"max_{side}_positions"], WIDTH)
        if args.get("layernorm_embedding"):
            yield from module(f"{stack}.layernorm_embedding", WIDTH)
        if args[f"{stack}_normalize_before"] and not old:
            yield from module(f"{stack}.layer_norm", WIDTH)
        for i in range(args[f"{stack}_layers"]):
            yield from layer_shapes(f"{stack}.layers.{i}", ATTENTIONS[stack], old=old)
    if not args.get("share_decoder_input_output_embed"):
        yield "decoder.embed_out" if old else "decoder.output_projection.weight", (TARGET, WIDTH)


def layer_shapes(layer: str, attentions: list[str], *, old: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number, name in enumerate(attentions):
        if old:
            yield f"{layer}.{name}.in_proj_weight", (3 * WIDTH, WIDTH)
            yield f"{layer}.{name}.in_proj_bias", (3 * WIDTH,)
        for part in () if old else ("q_proj", "k_proj", "v_proj"):
            yield from module(f"{layer}.{name}.{part}", WIDTH, WIDTH)
        yield from module(f"{layer}.{name}.out_proj", WIDTH, WIDTH)
        yield from module(f"{layer}.layer_norms.{number}" if old else f"{layer}.{name}_layer_norm", WIDTH)
    yield from module(f"{layer}.fc1", INNER, WIDTH)
    yield from module(f"{layer}.fc2", WIDTH, INNER)
    yield from module(f"{layer}.layer_norms.{len(attentions)}" if old else f"{layer}.final_layer_norm", WIDTH)


def module(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def state_of(args: dict[str, Any], *, old: bool = False) -> dict[str, Tensor]:
    state = drawn(dict(shapes_of(args, old=old)))
    if args.get("share_decoder_input_output_embed") and not old:
        state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    for stack in ("encoder", "decoder"):
        state[f"{stack}.version"] = torch.tensor([1.0 if old else 3.0])
        if not args.get(f"{stack}_learned_pos"):
            state[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
    return state


def written(folder: Path, args: dict[str, Any], state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "fairseq", **config}))
    (folder / "args.json").write_text(json.dumps(args))
    torch.save({"model": state, "extra_state": {"epoch": 3}}, folder / "model.pt")
    return folder
