"""The recipe in models/fr-en: it trains, writes what transformers read, and is the recipe of the model next to it."""

import gzip
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MODEL = Path(__file__).parents[2] / "models" / "fr-en"
SCRIPT = MODEL / "train.py"
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "source.spm",
    "target.spm",
    "tokenizer_config.json",
    "vocab.json",
}

# Run apart from pytest, where every warning is an error: transformers recommend a package that this model does not use.
TRANSLATE = """
import json, sys
from transformers import MarianMTModel, MarianTokenizer
tokenizer = MarianTokenizer.from_pretrained(sys.argv[1])
model = MarianMTModel.from_pretrained(sys.argv[1])
inputs = tokenizer(["Je ne sais pas."], return_tensors="pt")
outputs = model.generate(**inputs)
print(json.dumps({
    "inputs": inputs.input_ids[0].tolist(),
    "outputs": outputs[0].tolist(),
    "there_and_back": tokenizer.decode(inputs.input_ids[0], skip_special_tokens=True),
}))
"""


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def last_json(output: str) -> Any:
    return json.loads(output.splitlines()[-1])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def settings(path: Path) -> dict[str, Any]:
    """The content of a configuration file but for what saving the weights or another release of transformers adds."""
    content: dict[str, Any] = read_json(path)
    return {k: v for k, v in content.items() if k not in {"architectures", "dtype", "transformers_version"}}


@dataclass(frozen=True, slots=True)
class Trained:
    folder: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model of `train.py --smoke`."""
    folder = tmp_path_factory.mktemp("smoke") / "models" / "toy"
    done = run_python(SCRIPT, "--smoke", "--output", folder)
    assert done.returncode == 0, done.stderr
    return Trained(folder, last_json(done.stdout))


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """train.py as a module; its folder is not a package."""
    spec = importlib.util.spec_from_file_location("fr_en_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shipped_vocabulary(recipe: ModuleType) -> Any:
    return recipe.Vocabulary((MODEL / "source.spm").read_bytes())


def test_the_loss_goes_down(trained: Trained) -> None:
    clean, casual = trained.report["stages"]
    assert clean["last_loss"] < clean["first_loss"] - 0.5
    assert casual["valid_loss"] < clean["first_loss"] - 0.5


def test_the_folder_has_the_files_of_the_shipped_model_and_nothing_else(trained: Trained) -> None:
    assert {path.name for path in trained.folder.iterdir()} == MODEL_FILES
    assert {path.name for path in MODEL.iterdir()} >= MODEL_FILES
    assert [path.name for path in trained.folder.parent.iterdir()] == [trained.folder.name], "scratch is left"


def test_ids_are_numbered_as_marianmt_wants(trained: Trained) -> None:
    ids = read_json(trained.folder / "vocab.json")
    pad = len(ids) - 1
    assert (ids["</s>"], ids["<unk>"], ids["<pad>"]) == (0, 1, pad)
    assert sorted(ids.values()) == list(range(len(ids)))
    for name in ("config.json", "generation_config.json"):
        config = read_json(trained.folder / name)
        assert (config["decoder_start_token_id"], config["pad_token_id"], config["eos_token_id"]) == (pad, pad, 0)
    assert read_json(trained.folder / "config.json")["vocab_size"] == len(ids)


def test_transformers_load_it_and_generate(trained: Trained) -> None:
    done = run_python("-c", TRANSLATE, trained.folder)
    assert done.returncode == 0, done.stderr
    answer = last_json(done.stdout)
    pad = read_json(trained.folder / "config.json")["pad_token_id"]
    assert answer["there_and_back"] == "Je ne sais pas."
    assert answer["inputs"][-1] == 0
    assert answer["outputs"][0] == pad
    assert pad not in answer["outputs"][1:]


def test_the_recipe_numbers_the_shipped_pieces_as_the_shipped_model_does(
    shipped_vocabulary: Any, tmp_path: Path
) -> None:
    shipped_vocabulary.write(tmp_path)
    for name in ("vocab.json", "tokenizer_config.json", "source.spm", "target.spm"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name


def test_the_recipe_builds_the_shipped_architecture(
    recipe: ModuleType, shipped_vocabulary: Any, tmp_path: Path
) -> None:
    model = recipe.new_model(recipe.FULL, shipped_vocabulary)
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert settings(tmp_path / name) == settings(MODEL / name), name


@pytest.mark.parametrize(
    ("text", "without_punctuation", "small"),
    [
        ("Où es-tu ?", "Où es-tu", "où es-tu ?"),
        ("I'm here...", "I'm here", "i'm here..."),
        ("État 3.5", "État 3.5", "état 3.5"),
        ("?!", "?!", "?!"),
    ],
)
def test_casual_habits(recipe: ModuleType, text: str, without_punctuation: str, small: str) -> None:
    assert recipe.without_final_punctuation(text) == without_punctuation
    assert recipe.with_small_initial(text) == small


def test_both_sides_of_a_casual_pair_have_the_same_habits(recipe: ModuleType) -> None:
    casual = recipe.with_casual_share([("Bonjour.", "Hello.")] * 2000, 0.2, random.Random(3))
    changed = [pair for pair in casual if pair != ("Bonjour.", "Hello.")]
    assert set(changed) == {("bonjour.", "hello."), ("Bonjour", "Hello"), ("bonjour", "hello")}
    assert 300 < len(changed) < 500


def test_each_epoch_has_every_example_once_within_the_budget(recipe: ModuleType) -> None:
    rng = random.Random(5)
    examples = [([number] * rng.randint(1, 30), [number] * rng.randint(1, 30)) for number in range(500)]
    batches = recipe.make_batches(examples, 64, rng)
    assert sorted(example for batch in batches for example in batch) == sorted(examples)
    assert all(len(batch) * max(map(recipe.longest_side, batch)) <= 64 for batch in batches)


def test_the_rate_rises_to_the_peak_and_falls_to_zero(recipe: ModuleType) -> None:
    stage = recipe.FULL.stages[0]
    rates = [stage.rate_at(step) for step in range(stage.steps)]
    assert max(rates) == rates[stage.warmup_steps - 1] == stage.peak_rate
    assert rates[: stage.warmup_steps] == sorted(rates[: stage.warmup_steps])
    assert rates[stage.warmup_steps :] == sorted(rates[stage.warmup_steps :], reverse=True)
    assert rates[-1] < 1e-8


def test_a_missing_data_folder_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run_python(SCRIPT, "--data", tmp_path / "nowhere", "-o", tmp_path / "model")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"train.py: {tmp_path / 'nowhere' / 'train.tsv.gz'}: No such file or directory\n"
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"Bonjour.\tHello.\n", "Not a gzipped file"),
        (gzip.compress(b"Bonjour.\tHello.\n" * 99, mtime=0)[:-9], "Compressed file ended"),
        (gzip.compress(b"\xff\tHello.\n", mtime=0), "invalid start byte"),
        (gzip.compress(b"Bonjour.\tHello.\nSalut.\n", mtime=0), "line 2 is not French TAB English"),
        (gzip.compress(b"", mtime=0), "no sentence pairs"),
        (gzip.compress(b"Bonjour.\tHello.\n", mtime=0), "no vocabulary of 6000 from this data"),
    ],
    ids=["not-gzip", "cut-off", "not-utf-8", "no-tab", "empty", "too-little"],
)
def test_bad_data_is_one_line_and_status_2(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, problem: str
) -> None:
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.tsv.gz").write_bytes(content)
    assert recipe.main(["--data", str(tmp_path), "-o", str(tmp_path / "model")]) == 2
    assert_one_line(capsys.readouterr().err, problem)
    assert {path.name for path in tmp_path.iterdir()} == {"train.tsv.gz", "valid.tsv.gz", "test.tsv.gz"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-o", "x"], "one of the arguments --data --smoke is required"),
        (["--smoke"], "the following arguments are required: -o/--output"),
        (["--smoke", "--data", "x", "-o", "x"], "not allowed with argument"),
        (["--smoke", "-o", "x", "--steps", "0"], "'0' is not a whole number from 1 on"),
        (["--smoke", "-o", "x", "--seed", "lucky"], "'lucky' is not a whole number from 0 on"),
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(
    recipe: ModuleType, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], problem: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe.main(arguments)
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err, problem)


def test_an_output_that_exists_is_left_alone(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe.main(["--smoke", "-o", str(tmp_path)]) == 2
    assert_one_line(capsys.readouterr().err, "exists already")


def assert_one_line(text: str, problem: str) -> None:
    assert problem in text
    assert text.startswith("train.py: ")
    assert text.count("\n") == 1
