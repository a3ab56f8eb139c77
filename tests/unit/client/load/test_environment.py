"""What a report says about the machine, from commands that answer what the test says."""

import sys

import pytest

from beamline_client.load.environment import NOT_INSTALLED, ask, commit, cpu_model, describe, gpu, version

COMMIT = "1dac35f1095adcb813f7d3b0b093d0833602b2c5"


class Commands:
    """Answers by the command's first two words that are no options; everything else is not there."""

    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers

    def __call__(self, *command: str) -> str | None:
        return self._answers.get(" ".join([word for word in command if not word.startswith("-")][:2]))


def test_everything_is_described() -> None:
    answers = {
        "nvidia-smi": "NVIDIA H200\n",
        "git ls-files": "__init__.py",
        "git rev-parse": COMMIT,
        "git status": "",
    }

    told = describe(Commands(answers))

    assert told.python == ".".join(map(str, sys.version_info[:3]))
    assert told.gpu == "NVIDIA H200"
    assert told.commit == COMMIT
    assert told.cores >= 1
    assert told.cpu
    assert set(told.libraries) == {"grpcio", "protobuf", "numpy", "hdrhistogram"}
    assert NOT_INSTALLED not in told.libraries.values()


def test_nothing_but_python_is_needed() -> None:
    told = describe(Commands({}))

    assert (told.gpu, told.commit) == (None, None)


def test_this_machine_can_be_described() -> None:
    assert describe().platform


@pytest.mark.parametrize(("changes", "told"), [("", COMMIT), (" M README.md", f"{COMMIT}-dirty"), (None, COMMIT)])
def test_a_tree_with_changes_is_dirty(changes: str | None, told: str) -> None:
    answers = {"git ls-files": "__init__.py", "git rev-parse": COMMIT}
    if changes is not None:
        answers["git status"] = changes

    assert commit(Commands(answers)) == told


def test_somebody_elses_tree_is_not_ours() -> None:
    assert commit(Commands({"git rev-parse": COMMIT, "git status": ""})) is None


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("", None),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA H200\nNVIDIA H200\n", "2 × NVIDIA H200"),
        ("NVIDIA L4\nNVIDIA H200\nNVIDIA L4", "2 × NVIDIA L4, NVIDIA H200"),
    ],
)
def test_equal_gpus_are_counted(answer: str, told: str | None) -> None:
    assert gpu(Commands({"nvidia-smi": answer})) == told


def test_the_first_processor_names_the_cpu() -> None:
    text = "processor\t: 0\nmodel name\t: AMD EPYC  9654\nflags\t\t: fpu\n\nprocessor\t: 1\nmodel name\t: other\n"

    assert cpu_model(text) == "AMD EPYC 9654"


@pytest.mark.parametrize("text", ["", "processor\t: 0\nBogoMIPS\t: 50.00\n", "model name\t:\n", "model name"])
def test_a_cpu_may_have_no_name(text: str) -> None:
    assert cpu_model(text) is None


def test_a_distribution_may_be_missing() -> None:
    assert version("no-such-distribution") == NOT_INSTALLED


def test_a_command_may_be_missing_or_fail() -> None:
    assert ask("no-such-command-of-any-machine") is None
    assert ask(sys.executable, "-c", "raise SystemExit(1)") is None
    assert ask(sys.executable, "-c", "print(' told ')") == "told"


def test_a_command_that_hangs_is_given_up() -> None:
    assert ask(sys.executable, "-c", "import signal; signal.pause()", within_s=0.05) is None
