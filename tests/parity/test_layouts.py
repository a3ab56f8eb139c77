"""Checkpoints in other layouts: modules written here in plain PyTorch, against what the export makes of them."""

import copy
import functools
import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from beamline_export.agreement import search_all
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.parity import all_logprobs, random_sources
from beamline_export.progress import Progress
from beamline_export.reference_search import reference_search
from beamline_export.spec import ExportError
from beamline_export.testing import DECODER_START, EOS, nn_config, randomize
from beamline_server.bundle import Bundle
from beamline_server.engine.request import EarlyStopping, Finish, SearchOptions
from beamline_server.models.load import build_backend, model_rules
from doubles.annotated import HEADS, INNER, LAYERS, ROWS, SOURCE, TARGET, WIDTH, AnnotatedTransformer, sines

pytestmark = pytest.mark.parity

SEARCHES = [
    SearchOptions(4, 4, max_new_tokens=12, early_stopping=EarlyStopping.WHEN_FULL),
    SearchOptions(1, 1, max_new_tokens=16),
]


class TokenEmbedding(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * math.sqrt(WIDTH)  # type: ignore[no-any-return]


class TutorialPositions(nn.Module):
    pos_embedding: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pos_embedding", sines(ROWS)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos_embedding[: x.shape[0]]


class TutorialTransformer(nn.Module):
    """Named as PyTorch's tutorial on translation names its parts; sequence first, as there."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about speed, where sequences come first
            self.transformer = nn.Transformer(WIDTH, HEADS, LAYERS, LAYERS, INNER)
        self.generator = nn.Linear(WIDTH, TARGET)
        self.src_tok_emb, self.tgt_tok_emb = TokenEmbedding(SOURCE), TokenEmbedding(TARGET)
        self.positional_encoding = TutorialPositions()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.positional_encoding(self.src_tok_emb(source.T))
        y = self.positional_encoding(self.tgt_tok_emb(target.T))
        mask = nn.Transformer.generate_square_subsequent_mask(len(y))
        return self.generator(self.transformer(x, y, tgt_mask=mask)).transpose(0, 1)  # type: ignore[no-any-return]


class CustomTransformer(nn.Module):
    """An nn.Transformer whose stacks are made by hand: some without a final norm, with a callable for activation."""

    def __init__(self, final_norms: tuple[bool, bool], activation: Any) -> None:
        super().__init__()
        self.src_embed, self.tgt_embed = nn.Embedding(SOURCE, WIDTH), nn.Embedding(TARGET, WIDTH)
        given = {"dim_feedforward": INNER, "activation": activation, "batch_first": True}
        norms = [nn.LayerNorm(WIDTH) if wanted else None for wanted in final_norms]
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, **given), LAYERS, norms[0], enable_nested_tensor=False
        )
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, **given), LAYERS, norms[1])
        self.transformer = nn.Transformer(
            WIDTH, HEADS, custom_encoder=encoder, custom_decoder=decoder, batch_first=True
        )
        self.generator = nn.Linear(WIDTH, TARGET)
        self.register_buffer("pe", sines(48))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = (
            embed(ids) * math.sqrt(WIDTH) + self.pe[: ids.shape[1]]  # type: ignore[index]
            for embed, ids in ((self.src_embed, source), (self.tgt_embed, target))
        )
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.generator(self.transformer(x, y, tgt_mask=mask))  # type: ignore[no-any-return]


def written(model: nn.Module, folder: Path, seed: int, **changes: Any) -> Path:
    """A checkpoint folder of the module, with random weights."""
    randomize(model.eval(), seed)
    return saved(model, folder, **changes)


def saved(model: nn.Module, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(nn_config(d_model=WIDTH, **changes)))
    return folder


def exported(folder: Path, told: io.StringIO | None = None) -> Bundle:
    return export(folder, folder.with_name("bundle"), ExportOptions(), Progress(told or io.StringIO()))


def logprobs(model: nn.Module, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    with torch.inference_mode():
        ids = torch.tensor([list(source)] * len(targets))
        result: NDArray[np.float32] = model(ids, torch.tensor([list(t) for t in targets])).log_softmax(-1).numpy()
    return result


def greedy(model: nn.Module, source: Sequence[int], most: int, eos: Sequence[int] = (EOS,)) -> tuple[int, ...]:
    """What the module says, word by word."""
    tokens = [DECODER_START]
    while len(tokens) <= most and (len(tokens) == 1 or tokens[-1] not in eos):
        tokens.append(int(logprobs(model, source, [tokens])[0, -1].argmax()))
    return tuple(tokens[1:])


def same_outputs(bundle: Bundle, model: nn.Module, sources: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """How many sources have the same outputs as by the module's own decoding, by beam size."""
    rules, backend = model_rules(bundle.manifest), build_backend(bundle, "cpu", threads=1)
    same = {}
    for options in SEARCHES:
        answers = search_all(backend, rules, [(source, options) for source in sources])
        found = [[h.tokens for h in answer.hypotheses] for answer in answers]
        if options.beam_size == 1:
            expected = [[greedy(model, source, options.max_new_tokens, rules.search.eos)] for source in sources]
        else:
            traces = [
                reference_search(
                    lambda prefixes, source=source: logprobs(model, source, prefixes)[:, -1],  # type: ignore[misc]
                    rules.search,
                    options,
                    rules.decoder_start,
                )
                for source in sources
            ]
            expected = [[h.tokens for h in trace.hypotheses] for trace in traces]
        same[options.beam_size] = sum(a == b for a, b in zip(found, expected, strict=True))
    return same


def sources_of(count: int) -> tuple[tuple[int, ...], ...]:
    return random_sources(SOURCE, EOS, 20, count=count, seed=3)


def test_an_annotated_transformer_answers_as_it_does_itself(tmp_path: Path) -> None:
    """100 of 100 n-best lists and greedy outputs; the norm's deviation is the unbiased one."""
    model = AnnotatedTransformer()
    bundle = exported(written(model, tmp_path / "annotated", 0, layout="annotated_transformer"))
    assert same_outputs(bundle, model, sources_of(100)) == {4: 100, 1: 100}
    forced = np.array([[2, *range(3, 11)]])
    found = all_logprobs(build_backend(bundle, "cpu", threads=1), [[5, 8, 1]], forced, TARGET)[0]
    assert found == pytest.approx(logprobs(model, [5, 8, 1], forced.tolist())[0], abs=1e-4)


def test_tables_of_another_formula_are_used_as_they_are(tmp_path: Path) -> None:
    """As the error about them advises: as learned positions, by names of the file's own."""
    model = AnnotatedTransformer()
    for embed in (model.src_embed, model.tgt_embed):
        sine, cosine = sines(48).view(48, -1, 2).unbind(-1)
        embed[1].pe = torch.cat([sine, cosine], dim=-1)[None]
    changes = {"layout": "annotated_transformer", "max_positions": 48}
    folder = written(model, tmp_path / "annotated", 0, **changes)
    with pytest.raises(ExportError, match=r"src_embed\.1\.pe \[1, 48, 16\] \(a sinusoidal table, but all sines first"):
        exported(folder)
    names = {"src_embed.1.pe": "src_positions.weight", "tgt_embed.1.pe": "tgt_positions.weight"}
    (folder / "config.json").write_text(
        json.dumps(nn_config(d_model=WIDTH, positions="learned", names=names, **changes))
    )
    assert same_outputs(exported(folder), model, sources_of(20)) == {4: 20, 1: 20}


def test_a_biased_norm_would_not_do(tmp_path: Path) -> None:
    """The comparison above tells the two deviations apart."""
    model = AnnotatedTransformer()
    bundle = exported(written(model, tmp_path / "annotated", 0, layout="annotated_transformer"))
    biased = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in biased.named_parameters():
            if name.endswith("a_2"):
                parameter.mul_(math.sqrt(WIDTH / (WIDTH - 1)))
    assert same_outputs(bundle, biased, sources_of(30)) != {4: 30, 1: 30}


def test_a_row_of_equal_numbers_becomes_the_norms_bias(tmp_path: Path) -> None:
    """Where an embedding cancels its position, nothing is left to divide by; neither side makes nan of it."""
    model, first = AnnotatedTransformer(), 3
    randomize(model, 0)
    with torch.no_grad():
        for embed, token in ((model.src_embed, first), (model.tgt_embed, DECODER_START)):
            table: Any = embed[0].lut.weight  # type: ignore[union-attr]
            table[token] = (7 - sines(1)[0]) / math.sqrt(WIDTH)
            assert embed(torch.tensor([[token]])).unique().tolist() == [7]
    bundle = exported(saved(model, tmp_path / "annotated", layout="annotated_transformer"))
    source, forced = [first, 5, EOS], [DECODER_START, 4, 5, 6]
    found = all_logprobs(build_backend(bundle, "cpu", threads=1), [source], np.array([forced]), TARGET)[0]
    assert found == pytest.approx(logprobs(model, source, [forced])[0], abs=1e-4)


def test_the_tutorials_model_answers_as_it_does_itself(tmp_path: Path) -> None:
    model = TutorialTransformer()
    bundle = exported(written(model, tmp_path / "tutorial", 1, layout="pytorch_tutorial"))
    assert same_outputs(bundle, model, sources_of(30)) == {4: 30, 1: 30}


@pytest.mark.parametrize("layout", ["beamline", "annotated_transformer"])
def test_a_layout_that_is_another_is_refused_by_its_names(layout: str, tmp_path: Path) -> None:
    folder = written(TutorialTransformer(), tmp_path / "tutorial", 1, layout=layout)
    with pytest.raises(ExportError, match=r"not part of the model: .*src_tok_emb\.embedding\.weight"):
        exported(folder)


GELU_TANH = functools.partial(functional.gelu, approximate="tanh")


@pytest.mark.parametrize(
    ("norms", "said", "activation", "name"),
    [
        ((False, False), False, GELU_TANH, "gelu_tanh"),
        ((True, False), "encoder", functional.relu, "relu"),
        ((False, True), "decoder", functional.gelu, "gelu"),
    ],
)
def test_stacks_without_a_final_norm_and_other_activations(
    norms: tuple[bool, bool], said: object, activation: Any, name: str, tmp_path: Path
) -> None:
    model = CustomTransformer(norms, activation)
    bundle = exported(written(model, tmp_path / "custom", 2, final_norm=said, activation=name))
    assert same_outputs(bundle, model, sources_of(20)) == {4: 20, 1: 20}


@pytest.mark.parametrize("changes", [{"eos_token_id": ...}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_a_model_without_an_end_runs_to_its_length(changes: dict[str, Any], tmp_path: Path) -> None:
    model, told = TutorialTransformer(), io.StringIO()
    folder = written(model, tmp_path / "endless", 1, layout="pytorch_tutorial", **{**changes, "eos_token_id": None})
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    bundle = exported(folder, told)
    assert "warning: config.json names no eos_token_id" in told.getvalue()
    assert bundle.manifest.special_tokens.eos == ()
    sources = sources_of(20)
    assert same_outputs(bundle, model, sources) == {4: 20, 1: 20}
    backend = build_backend(bundle, "cpu", threads=1)
    options = [*SEARCHES, SearchOptions(3, 3, max_new_tokens=7, min_new_tokens=3, early_stopping=EarlyStopping.NEVER)]
    for search in options:
        for answer in search_all(backend, model_rules(bundle.manifest), [(source, search) for source in sources]):
            assert {len(h.tokens) for h in answer.hypotheses} == {search.max_new_tokens}
            assert {h.finish for h in answer.hypotheses} == {Finish.LENGTH}


def test_a_state_dict_as_lightning_saves_it(tmp_path: Path) -> None:
    """Within other things, behind the name of the attribute that holds the module, compiled."""
    model = TutorialTransformer()
    folder = written(model, tmp_path / "lightning", 1, layout="pytorch_tutorial")
    state = {f"model._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    torch.save(
        {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {}}], "hyper_parameters": {"lr": 0.1}},
        folder / "model.pt",
    )
    told = io.StringIO()
    bundle = exported(folder, told)
    assert "names in the file begin with 'model.'; it is left off" in told.getvalue()
    assert same_outputs(bundle, model, sources_of(10)) == {4: 10, 1: 10}
