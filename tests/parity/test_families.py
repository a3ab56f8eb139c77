"""Every family, exported from small random checkpoints, against PyTorch: the export's own gate, and whole searches."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from beamline_export.agreement import NEAR_TIE, Tokens, find_parting, search_all
from beamline_export.build_graphs import build_graphs
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.calibration import RangeStore
from beamline_export.families.registry import detect
from beamline_export.generate_oracle import GenerateOracle
from beamline_export.graph_writer import WeightsFile
from beamline_export.parity import random_sources
from beamline_export.precision import CalibratedInt8Store
from beamline_export.progress import Progress
from beamline_export.reference import HuggingFaceReference, Reference
from beamline_export.reference_search import reference_search
from beamline_export.testing import EOS, nn_config, write_hugging_face, write_nn_transformer
from beamline_server.bundle import Bundle
from beamline_server.engine.request import EarlyStopping, LengthPenaltyKind, SearchOptions
from beamline_server.models.load import build_backend, check_golden, model_rules
from beamline_server.tokenizer import load_tokenizer

pytestmark = pytest.mark.parity

MODEL_CLASSES = {
    "marian": "MarianMTModel",
    "bart": "BartForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}

SEARCHES = [
    SearchOptions(1, 1, max_new_tokens=16),
    SearchOptions(1, 1, max_new_tokens=12, min_new_tokens=5),
    SearchOptions(4, 4, max_new_tokens=14, early_stopping=EarlyStopping.WHEN_FULL),
    SearchOptions(4, 4, max_new_tokens=14, early_stopping=EarlyStopping.HEURISTIC, length_penalty=0.6),
    SearchOptions(4, 4, max_new_tokens=14, early_stopping=EarlyStopping.NEVER, length_penalty=2.0),
    SearchOptions(4, 3, max_new_tokens=9, early_stopping=EarlyStopping.NEVER, length_penalty=-1.0),
    SearchOptions(5, 2, max_new_tokens=10, min_new_tokens=4, length_penalty=0.0),
    SearchOptions(2, 2, max_new_tokens=1),
]


@dataclass(frozen=True)
class HuggingFaceCase:
    """A random checkpoint of a Hugging Face family."""

    family: str
    seed: int
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    file: str = "model.safetensors"


HUGGING_FACE = [
    pytest.param(
        HuggingFaceCase(
            "marian",
            0,
            {"activation_function": "swish", "scale_embedding": True},
            {"bad_words_ids": [[0]], "forced_eos_token_id": EOS, "renormalize_logits": True},
        ),
        id="marian-as-opus-mt",
    ),
    pytest.param(
        HuggingFaceCase("marian", 1, {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 90}),
        id="marian-separate-vocabularies",
    ),
    pytest.param(
        HuggingFaceCase(
            "marian",
            2,
            {
                "share_encoder_decoder_embeddings": False,
                "tie_word_embeddings": False,
                "decoder_vocab_size": 130,
                "activation_function": "gelu",
                "encoder_layers": 1,
                "decoder_layers": 3,
                "encoder_attention_heads": 1,
                "decoder_attention_heads": 8,
            },
            {"suppress_tokens": [5, 9], "begin_suppress_tokens": [EOS, 20]},
            file="pytorch_model.bin",
        ),
        id="marian-nothing-tied",
    ),
    pytest.param(
        HuggingFaceCase(
            "marian",
            3,
            {"activation_function": "relu", "d_model": 24, "encoder_ffn_dim": 40, "decoder_ffn_dim": 20},
            {"eos_token_id": [EOS, 7], "bad_words_ids": [[EOS], [0], [30]]},
        ),
        id="marian-two-ends",
    ),
    pytest.param(
        HuggingFaceCase("bart", 0, {}, {"forced_bos_token_id": 3, "forced_eos_token_id": EOS}), id="bart-forced"
    ),
    pytest.param(
        HuggingFaceCase(
            "bart",
            1,
            {"scale_embedding": True, "activation_function": "gelu_new", "encoder_layers": 3, "decoder_layers": 1},
            {"bad_words_ids": [[0], [11]], "forced_bos_token_id": 3},
            file="pytorch_model.bin",
        ),
        id="bart-scaled",
    ),
    pytest.param(
        HuggingFaceCase("bart", 2, {"tie_word_embeddings": False, "encoder_attention_heads": 2}), id="bart-untied"
    ),
    pytest.param(HuggingFaceCase("t5", 0), id="t5"),
    pytest.param(
        HuggingFaceCase(
            "t5",
            1,
            {
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
                # Not the other way round: with more layers in the decoder, generate itself fails (transformers 5.23).
                "num_layers": 3,
                "num_decoder_layers": 1,
                "num_heads": 2,
                "relative_attention_num_buckets": 5,
                "relative_attention_max_distance": 7,
            },
            {"bad_words_ids": [[0], [11]], "forced_eos_token_id": EOS},
            file="pytorch_model.bin",
        ),
        id="t5-gated-unscaled",
    ),
    pytest.param(
        HuggingFaceCase(
            "t5",
            2,
            {"feed_forward_proj": "gelu", "d_kv": 5, "num_heads": 4, "relative_attention_max_distance": 200},
            {"eos_token_id": [EOS, 7]},
        ),
        id="t5-odd-heads",
    ),
    pytest.param(HuggingFaceCase("mt5", 3), id="mt5"),
    pytest.param(
        HuggingFaceCase("mt5", 4, {"feed_forward_proj": "relu", "num_heads": 1, "d_kv": 24}), id="mt5-one-head"
    ),
    pytest.param(HuggingFaceCase("umt5", 5), id="umt5"),
    pytest.param(
        HuggingFaceCase(
            "umt5",
            6,
            {"feed_forward_proj": "gated-silu", "num_layers": 3, "relative_attention_num_buckets": 6},
            {"forced_bos_token_id": 3},
        ),
        id="umt5-gated-silu",
    ),
]

NN_TRANSFORMER = [
    pytest.param(0, {}, "model.safetensors", id="paper"),
    pytest.param(
        1,
        {"positions": "learned", "norm_first": True, "activation": "gelu", "scale_embedding": False},
        "model.pt",
        id="pre-norm-learned",
    ),
    pytest.param(
        2, {"tie_embeddings": True, "bias": False, "source_vocab_size": 120}, "model.pt", id="tied-without-biases"
    ),
    pytest.param(
        3,
        {"tie_embeddings": True, "d_model": 15, "nhead": 3, "num_decoder_layers": 1, "layer_norm_eps": 1e-3},
        "model.safetensors",
        id="tied-odd-width",
    ),
    pytest.param(6, {"tie_embeddings": "all", "source_vocab_size": 120}, "model.safetensors", id="tied-all"),
    pytest.param(4, {"norm_first": True, "nhead": 1, "forced_eos_token_id": EOS}, "model.safetensors", id="one-head"),
    pytest.param(
        5,
        {"generation": {"bad_words_ids": [[0], [8]], "forced_bos_token_id": 6, "renormalize_logits": True}},
        "model.pt",
        id="bans",
    ),
]


def exported(checkpoint: Path, precision: str = "fp32", calibrate: Path | None = None) -> Bundle:
    options = ExportOptions(precision, calibrate=calibrate)
    return export(checkpoint, checkpoint.with_name(f"{checkpoint.name}-{precision}"), options, Progress(io.StringIO()))


def write(case: HuggingFaceCase, folder: Path, sharpness: float = 1.0) -> Path:
    write_hugging_face(folder, case.family, case.config, case.generation, seed=case.seed, sharpness=sharpness)
    if case.file != "model.safetensors":
        saved = folder / "model.safetensors"
        torch.save(load_file(saved), folder / case.file)
        saved.unlink()
    return folder


def sources_of(bundle: Bundle, seed: int) -> Sequence[Tokens]:
    return random_sources(bundle.manifest.dimensions.source_vocabulary, EOS, 20, count=8, seed=seed)


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_searches_equal_generate(case: HuggingFaceCase, tmp_path: Path) -> None:
    """The exported model's n-best lists are those of `generate`, scores included, but for near-ties."""
    checkpoint = write(case, tmp_path / "checkpoint")
    bundle = exported(checkpoint)
    assert bundle.manifest.parity["beam_search"]["parted_beyond_near_ties"] == 0  # type: ignore[index]
    rules, backend = model_rules(bundle.manifest), build_backend(bundle, "cpu", threads=1)
    oracle = GenerateOracle(HuggingFaceReference(MODEL_CLASSES[case.family], checkpoint).model, rules)
    sources = sources_of(bundle, case.seed)
    for options in SEARCHES:
        # What min_new_tokens bans is not renormalized; docs/bring-your-model.md says so.
        if case.generation.get("renormalize_logits") and options.min_new_tokens and options.beam_size > 1:
            continue
        comparisons = list(oracle.compare(backend, sources, options))
        assert len(comparisons) == len(sources)
        assert all(c.agrees for c in comparisons), [c.parting for c in comparisons if not c.agrees]
        assert max(c.score_difference for c in comparisons) < 1e-4
    # The oracle of the gate follows generate's steps exactly.
    for source in sources[:3]:
        oracle.trace(source, SEARCHES[3])


@pytest.mark.parametrize("family", ["marian", "bart"])
@pytest.mark.parametrize("head", [True, False], ids=["other-head", "other-source"])
def test_tables_that_the_config_alone_ties_are_the_files(family: str, head: bool, tmp_path: Path) -> None:
    """As in transformers, with which the export's own gate compares."""
    checkpoint = write(HuggingFaceCase(family, 4), tmp_path / "checkpoint")
    state = load_file(checkpoint / "model.safetensors")
    name = "lm_head.weight" if head else "model.encoder.embed_tokens.weight"
    state[name] = state["model.shared.weight"].flip(0).contiguous()
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    told = io.StringIO()
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(), Progress(told))
    assert bundle.manifest.parity["beam_search"]["parted_beyond_near_ties"] == 0  # type: ignore[index]
    assert f"{name} differ in the file" in told.getvalue() or f"{name} and" in told.getvalue()


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_a_head_of_its_own_is_the_files(family: str, tmp_path: Path) -> None:
    """As T5 1.1 and its kin have it: transformers tie what the file lacks alone."""
    checkpoint = write(HuggingFaceCase(family, 4, {"tie_word_embeddings": False}), tmp_path / "checkpoint")
    state = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    # As their own files have it, which transformers of today save otherwise.
    (checkpoint / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), "utf-8")
    state["lm_head.weight"] = state["shared.weight"].flip(0).contiguous()
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    told = io.StringIO()
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(), Progress(told))
    assert bundle.manifest.parity["beam_search"]["parted_beyond_near_ties"] == 0  # type: ignore[index]
    assert "differ in the file" not in told.getvalue()


@pytest.mark.parametrize(("seed", "changes", "file"), NN_TRANSFORMER)
def test_searches_equal_the_reference_search(seed: int, changes: dict[str, Any], file: str, tmp_path: Path) -> None:
    """An nn.Transformer's n-best lists are those of the reference search over PyTorch, but for near-ties."""
    checkpoint = write_nn_transformer(tmp_path / "checkpoint", nn_config(**changes), seed=seed, file=file)
    bundle = exported(checkpoint)
    assert bundle.manifest.parity["beam_search"]["parted_beyond_near_ties"] == 0  # type: ignore[index]
    family = detect(checkpoint)
    reference = family.reference(checkpoint, family.read(checkpoint))
    sources = sources_of(bundle, seed)[:4]
    gnmt = SearchOptions(3, 3, max_new_tokens=10, length_penalty_kind=LengthPenaltyKind.GNMT, length_penalty=0.6)
    for options in (*SEARCHES, gnmt):
        check_against_reference_search(bundle, reference, sources, options)


def check_against_reference_search(
    bundle: Bundle, reference: Reference, sources: Sequence[Tokens], options: SearchOptions
) -> None:
    rules, backend = model_rules(bundle.manifest), build_backend(bundle, "cpu", threads=1)
    answers = search_all(backend, rules, [(source, options) for source in sources])
    for source, answer in zip(sources, answers, strict=True):
        trace = reference_search(
            lambda prefixes, source=source: reference.logprobs(source, prefixes)[:, -1],  # type: ignore[misc]
            rules.search,
            options,
            rules.decoder_start,
        )
        expected, found = trace.hypotheses[: options.n_best], answer.hypotheses
        if [h.tokens for h in found] == [h.tokens for h in expected]:
            assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-4, rel=1e-4)
        else:
            parting = find_parting(trace, backend, rules, source, options)
            assert parting is not None
            assert parting.margin < NEAR_TIE, parting


@pytest.mark.parametrize(
    ("family", "precision", "calibrate"),
    [
        *((family, "int8", calibrate) for family in (*MODEL_CLASSES, "nn_transformer") for calibrate in (False, True)),
        *((family, "int4", False) for family in (*MODEL_CLASSES, "nn_transformer")),
        *((family, "fp16", False) for family in (*MODEL_CLASSES, "nn_transformer")),
    ],
)
def test_smaller_precisions_pass_their_gate(family: str, precision: str, calibrate: bool, tmp_path: Path) -> None:
    """int8, int4 and fp16 bundles are close to PyTorch, smaller than fp32, and give their golden answers."""
    checkpoint = tmp_path / "checkpoint"
    if family == "nn_transformer":
        write_nn_transformer(checkpoint, nn_config(norm_first=True), sharpness=0.5)
    else:
        write(HuggingFaceCase(family, 0), checkpoint, sharpness=0.5)
    sentences = tmp_path / "sentences.txt"
    sources = random_sources(90, EOS, 30, count=40, seed=1)
    sentences.write_text("".join(f"{' '.join(map(str, source))}\n" for source in sources))
    bundle = exported(checkpoint, precision, sentences if calibrate else None)
    assert bundle.manifest.precision == precision
    forced: Any = bundle.manifest.parity["forced_decode"]
    assert forced["same_top_token"] > (0.6 if precision == "int4" else 0.9)
    assert bundle.file("weights.bin").stat().st_size < 0.6 * checkpoint.joinpath("model.safetensors").stat().st_size
    check_golden(bundle, build_backend(bundle, "cpu", threads=1))
    assert load_tokenizer(bundle) is None


class Asked(dict[str, float]):
    """Ranges that know which of them were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __missing__(self, name: str) -> float:
        self.names.add(name)
        return 1.0


CHECKPOINTS = [
    *(pytest.param(*case.values, id=case.id) for case in HUGGING_FACE),
    *(pytest.param(case.values, id=case.id) for case in NN_TRANSFORMER),
]


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_every_product_has_its_range(case: Any, tmp_path: Path) -> None:
    """What calibration measures is what the calibrated graphs ask for, tied heads and missing biases included."""
    if isinstance(case, HuggingFaceCase):
        folder = write(case, tmp_path / "checkpoint")
    else:
        seed, changes, file = case
        folder = write_nn_transformer(tmp_path / "checkpoint", nn_config(**changes), seed=seed, file=file)
    checkpoint = detect(folder).read(folder)
    asked = Asked()
    graphs: dict[str, list[Any]] = {}
    for name, store in {"measured": RangeStore(), "calibrated": CalibratedInt8Store(asked)}.items():
        with WeightsFile(tmp_path / name) as weights:
            graphs[name] = [model.graph for model in build_graphs(checkpoint, store, "int8", weights).values()]
    outputs = [value.name for graph in graphs["measured"] for value in graph.output]
    measured = [name.removeprefix("range:") for name in outputs if name.startswith("range:")]
    products = [node for graph in graphs["calibrated"] for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(measured) == len(set(measured)) == len(products)
    assert set(measured) == asked.names
