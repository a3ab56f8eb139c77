"""A plain `torch.nn.Transformer` with embeddings and a generator: the model of "Attention is all you need".

The folder holds `model.safetensors` or `model.pt` and a `config.json`; docs/bring-your-model.md describes both.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beamline_export.checkpoint import MOST_LAYERS, MOST_POSITIONS, Fields, Renamer, read_json, read_state_dict
from beamline_export.generation import read_generation
from beamline_export.reference import Reference
from beamline_export.spec import Activation, Array, Checkpoint, ExportError, NormPlacement, TransformerSpec

_ACTIVATIONS = {"relu": Activation.RELU, "gelu": Activation.GELU}
_LEARNED = {"sinusoidal": False, "learned": True}
_SHARED_POSITIONS = "positions.weight"


@dataclass(frozen=True, slots=True)
class _Config:
    """What config.json says besides the spec."""

    spec: TransformerSpec
    learned_positions: bool
    tied: bool
    source_bos: int | None
    source_eos: int | None
    generation: dict[str, Any]


def read(folder: Path) -> Checkpoint:
    """Read a folder with an `nn.Transformer`.

    Raises:
        ExportError: config or weights are missing or contradict each other.
    """
    data = read_json(folder / "config.json")
    config = _read_config(data)
    generation = read_generation({**data, **config.generation}, None, max_positions=config.spec.max_target_positions)
    kind, files = _tokenizer(folder)
    names = _rename(config, read_state_dict(folder))
    return Checkpoint(
        config.spec,
        names.result(),
        dataclasses.replace(generation.tokens, source_bos=config.source_bos, source_eos=config.source_eos),
        generation.defaults,
        kind,
        files,
        generation.removed,
        names.names,
    )


def _read_config(data: Mapping[str, Any]) -> _Config:
    fields = Fields(data, "config.json")
    d_model, heads, ffn = fields.integer("d_model"), fields.integer("nhead"), fields.integer("dim_feedforward")
    positions = fields.integer("max_positions", most=MOST_POSITIONS)
    spec = TransformerSpec(
        architecture="nn_transformer",
        d_model=d_model,
        encoder_layers=fields.integer("num_encoder_layers", most=MOST_LAYERS),
        decoder_layers=fields.integer("num_decoder_layers", most=MOST_LAYERS),
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_ffn=ffn,
        decoder_ffn=ffn,
        norm_placement=NormPlacement.PRE if fields.flag("norm_first", False) else NormPlacement.POST,
        activation=fields.choice("activation", _ACTIVATIONS, "relu"),
        source_vocabulary=fields.integer("source_vocab_size"),
        target_vocabulary=fields.integer("target_vocab_size", least=2),
        max_source_positions=positions,
        max_target_positions=positions,
        embedding_scale=math.sqrt(d_model) if fields.flag("scale_embedding", True) else 1.0,
        # nn.Transformer ends both stacks with a norm, whatever norm_first says.
        encoder_final_norm=True,
        decoder_final_norm=True,
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
    )
    config = _Config(
        spec=spec,
        learned_positions=fields.choice("positions", _LEARNED, "sinusoidal"),
        tied=fields.flag("tie_embeddings", False),
        source_bos=fields.optional_id("source_bos_token_id"),
        source_eos=fields.optional_id("source_eos_token_id"),
        generation=fields.mapping("generation"),
    )
    fields.check()
    return config


def interleaved_positions(positions: int, width: int) -> Array:
    """The paper's table, (positions, width): sine at even, cosine at odd features (Vaswani et al. 2017, §3.5)."""
    angle = np.arange(positions)[:, None] * np.power(10000.0, -np.arange(0, width, 2) / width)[None]
    table = np.zeros((positions, width), np.float32)
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle)[:, : width // 2]
    return table


def _rename(config: _Config, state: Mapping[str, Array]) -> Renamer:
    names, spec = Renamer(state), config.spec
    _take_embeddings(names, config, state)
    if config.learned_positions:
        names.take("source_positions", "src_positions.weight", _SHARED_POSITIONS)
        names.take("target_positions", "tgt_positions.weight", _SHARED_POSITIONS)
    else:
        # Often registered as a buffer; computed here, whatever shape it was given there.
        names.ignore(r"(.*\.)?(pe|positional_encoding|pos_encoding|positions)(\.pe|\.weight)?")
        names.compute_positions(spec.max_source_positions, spec.d_model, interleaved_positions)
    for side, layers in (("encoder", spec.encoder_layers), ("decoder", spec.decoder_layers)):
        for i in range(layers):
            _take_layer(names, side, i)
        names.module(f"{side}.final_norm", f"transformer.{side}.norm")
    return names


def _take_embeddings(names: Renamer, config: _Config, state: Mapping[str, Array]) -> None:
    names.take("source_embedding", "src_embed.weight")
    # Of tied weights, some ways of saving keep only one.
    names.take("target_embedding", "tgt_embed.weight", *(["generator.weight"] if config.tied else []))
    if config.tied:
        target, head = state.get("tgt_embed.weight"), state.get("generator.weight")
        if target is not None and head is not None and not np.array_equal(target, head):
            raise ExportError(
                "tie_embeddings is true, but tgt_embed.weight and generator.weight differ; set it to false"
            )
        names.alias("head.weight", "target_embedding")
    else:
        names.take("head.weight", "generator.weight")
    names.share_equal("source_embedding", "target_embedding", "head.weight")
    names.take("head.bias", "generator.bias")
    names.weights.setdefault("head.bias", np.zeros(config.spec.target_vocabulary, np.float32))


def _take_layer(names: Renamer, side: str, i: int) -> None:
    here, there = f"{side}.{i}", f"transformer.{side}.layers.{i}"
    attentions = {"self_attention": ("self_attn", "norm1")}
    if side == "decoder":
        attentions["cross_attention"] = ("multihead_attn", "norm2")
    for attention, (name, norm) in attentions.items():
        names.thirds([f"{here}.{attention}.{p}" for p in ("query", "key", "value")], f"{there}.{name}.in_proj_")
        names.module(f"{here}.{attention}.output", f"{there}.{name}.out_proj")
        names.module(f"{here}.{attention}_norm", f"{there}.{norm}")
    names.module(f"{here}.ffn.up", f"{there}.linear1")
    names.module(f"{here}.ffn.down", f"{there}.linear2")
    names.module(f"{here}.ffn_norm", f"{there}.{'norm3' if side == 'decoder' else 'norm2'}")


def _tokenizer(folder: Path) -> tuple[str, dict[str, str]]:
    if (folder / "tokenizer.json").exists():
        both = ("tokenizer.json", "target_tokenizer.json")
        return "tokenizers", {name: name for name in both if (folder / name).exists()}
    models = {name: name for name in ("source.spm", "target.spm") if (folder / name).exists()}
    if len(models) == 1:
        raise ExportError(f"{folder} holds only one of source.spm and target.spm; copy both, even if they are the same")
    return ("sentencepiece", models) if models else ("none", {})


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model as PyTorch runs it."""
    config = _read_config(read_json(folder / "config.json"))
    return _NnReference(config, read_state_dict(folder), checkpoint.removed_tokens)


class _NnReference:
    """`torch.nn.Transformer` between embeddings and a generator."""

    def __init__(self, config: _Config, state: Mapping[str, Array], removed: Sequence[int]) -> None:
        import torch

        spec = config.spec
        self._scale, self._removed = spec.embedding_scale, list(removed)
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # about a shortcut for padded batches that some models cannot take
            self._transformer = torch.nn.Transformer(
                d_model=spec.d_model,
                nhead=spec.encoder_heads,
                num_encoder_layers=spec.encoder_layers,
                num_decoder_layers=spec.decoder_layers,
                dim_feedforward=spec.encoder_ffn,
                dropout=0.0,
                activation=spec.activation.value,
                layer_norm_eps=spec.norm_epsilon,
                batch_first=True,
                norm_first=spec.norm_placement is NormPlacement.PRE,
            ).eval()
        own = self._transformer.state_dict()
        # A model without biases is one with zeros for biases.
        zeros = {name: torch.zeros(tensor.shape) for name, tensor in own.items() if name.endswith("bias")}
        saved = {n.removeprefix("transformer."): t for n, t in tensors.items() if n.startswith("transformer.")}
        self._transformer.load_state_dict(zeros | saved, assign=True)
        self._source = tensors["src_embed.weight"]
        self._target = tensors["tgt_embed.weight" if "tgt_embed.weight" in tensors else "generator.weight"]
        self._generator = self._target if config.tied else tensors["generator.weight"]
        self._bias = tensors.get("generator.bias")
        table = torch.from_numpy(interleaved_positions(spec.max_source_positions, spec.d_model))
        shared = tensors.get(_SHARED_POSITIONS, table) if config.learned_positions else table
        learned = tensors if config.learned_positions else {}
        self._source_positions = learned.get("src_positions.weight", shared)
        self._target_positions = learned.get("tgt_positions.weight", shared)

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As `Reference.logprobs`."""
        import torch

        with torch.inference_mode():
            ids, inputs = torch.tensor([list(source)] * len(targets)), torch.tensor([list(t) for t in targets])
            x = self._source[ids] * self._scale + self._source_positions[: ids.shape[1]]
            y = self._target[inputs] * self._scale + self._target_positions[: inputs.shape[1]]
            mask = torch.nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
            # tgt_is_causal would allow a fused path that not every build has.
            hidden = self._transformer(x, y, tgt_mask=mask)
            logits = torch.nn.functional.linear(hidden, self._generator, self._bias)
            logits[..., self._removed] = -torch.inf
            result: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return result
