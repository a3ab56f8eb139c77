"""Prompts to a served decoder without an encoder: texts that continue them, through the client and a real server."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from beamline_client import AsyncClient, Client, Input, InvalidRequest, Piece, Result, SearchOptions
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.testing import write_hugging_face
from beamline_server.process import ServerProcess
from doubles.many_scripts import lines

POSITIONS = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 of random weights, which says something else behind every prompt."""
    folder = tmp_path_factory.mktemp("prompts") / "checkpoint"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines(400), trainer)
    config = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 0}
    write_hugging_face(folder, "gpt2", config, {"bos_token_id": 0, "eos_token_id": 0, "max_new_tokens": 12})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[ServerProcess]:
    """A server of it."""
    bundle = export(checkpoint, checkpoint.with_name("bundle"), ExportOptions(), Progress(io.StringIO()))
    with ServerProcess(bundle.path) as running:
        running.wait_until_serving()
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def client(served: ServerProcess) -> Iterator[Client]:
    with Client(served.target) as connected:
        yield connected


PROMPTS = ["The cat", "naïve café – ", "Привет", "", "猫が", "a" * 20, "two words and some more"]


def test_the_model_tells_that_it_takes_prompts(client: Client) -> None:
    info = client.info()
    assert info.model.decoder_only
    assert info.limits.max_target_tokens == POSITIONS
    assert info.default_search.max_new_tokens == 12


def test_the_text_continues_the_prompt(client: Client) -> None:
    """What is generated and the prompt are one text: asked to go on from a part, it goes on the same way."""
    for prompt, result in zip(PROMPTS, client.generate(PROMPTS, token_ids=True), strict=True):
        tokens = list(result.best.token_ids or ())
        again = client.generate_one(Input(prompt, target_prefix=tokens[:4]), token_ids=True)
        assert list(again.best.token_ids or ())[: len(tokens) - 4] == tokens[4:]
        assert again.text.startswith(result.text)
        alone = client.generate_one(prompt, token_ids=True)
        assert (alone.text, alone.best.token_ids) == (result.text, result.best.token_ids)


def test_pieces_are_the_text_of_the_result(served: ServerProcess) -> None:
    async def streamed(prompt: str) -> tuple[str, Result]:
        text = ""
        async with AsyncClient(served.target) as asynchronous:
            async for event in asynchronous.stream(prompt, search=SearchOptions(beam_size=4)):
                if isinstance(event, Piece):
                    text += event.text
                else:
                    return text, event
        raise AssertionError("no result came")

    async def all_of_them() -> None:
        for text, result in await asyncio.gather(*map(streamed, PROMPTS)):
            assert text == result.text

    asyncio.run(all_of_them())


def test_prompts_of_any_length_run_side_by_side(client: Client) -> None:
    """Those that are fed in parts, beside those that generate already, to the same answers as alone."""
    prompts = [[3 + (7 * i + j) % 500 for j in range(length)] for i, length in enumerate([1, 15, 16, 17, 33, 50, 51])]
    search = SearchOptions(beam_size=3, n_best=3, max_new_tokens=13)
    together = client.generate(prompts, search=search, token_ids=True)
    for prompt, result in zip(prompts, together, strict=True):
        alone = client.generate_one(prompt, search=search, token_ids=True)
        assert alone.hypotheses == result.hypotheses
        assert result.source_tokens == len(prompt)
        assert result.timing.steps == -(-len(prompt) // 16) - 1 + len(result.best.token_ids or ())


def test_a_prompt_that_leaves_no_room_is_refused_or_cut(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="has 64 tokens; expected at most 63, to leave room for one to generate"):
        client.generate_one([5] * POSITIONS)
    cut = client.generate_one([5] * POSITIONS, truncate=True)
    assert (cut.source_truncated, cut.source_tokens) == (True, POSITIONS - 12)


def test_answers_are_those_of_generate(client: Client, checkpoint: Path) -> None:
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint)
    for prompt in ([17], [44, 9, 120, 300], list(range(3, 40))):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, num_beams=4, num_return_sequences=4, do_sample=False
        )[:, len(prompt) :].tolist()
        search = SearchOptions(beam_size=4, n_best=4, max_new_tokens=10)
        result = client.generate_one(prompt, search=search, token_ids=True)
        ended = [[*ids[: ids.index(0) + 1]] if 0 in ids else ids for ids in expected]
        assert [list(h.token_ids or ()) for h in result.hypotheses] == ended
