"""Where settings come from, which source wins, and how problems are told."""

from pathlib import Path

import pytest

from beamline_server.settings import Settings, SettingsError, command_parser, flag_of, read_command


def problems(argv: list[str], environment: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read_command(argv, environment)
    return list(caught.value.problems)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "server.toml"


def test_defaults_need_no_source() -> None:
    command = read_command(["bundle"], {})
    assert command.bundle == Path("bundle")
    assert command.settings == Settings()
    assert (command.settings.grpc_port, command.settings.metrics_port) == (8001, 8002)


def test_flags_win_over_variables_and_variables_over_the_file(config: Path) -> None:
    config.write_text("max_rows = 1000\nmax_inputs = 1\nmax_queue_rows = 100\n")
    environment = {"BEAMLINE_MAX_INPUTS": "2", "BEAMLINE_MAX_QUEUE_ROWS": "200", "BEAMLINE_CONFIG": str(config)}
    settings = read_command(["bundle", "--max-queue-rows", "300"], environment).settings
    assert (settings.max_rows, settings.max_inputs, settings.max_queue_rows) == (1000, 2, 300)


def test_the_config_flag_wins_over_its_variable(config: Path) -> None:
    config.write_text("max_rows = 99\n")
    command = read_command(["bundle", "--config", str(config)], {"BEAMLINE_CONFIG": "/nowhere"})
    assert command.settings.max_rows == 99


def test_every_setting_has_a_flag_and_a_description() -> None:
    text = command_parser().format_help()
    for name, info in Settings.model_fields.items():
        assert flag_of(name) in text
        assert info.description
        assert info.description.endswith(".")


@pytest.mark.parametrize(("argv", "expected"), [([], True), (["--no-reflection"], False), (["--reflection"], True)])
def test_booleans_are_switched_on_and_off(argv: list[str], expected: bool) -> None:
    assert read_command(["bundle", *argv], {}).settings.reflection is expected


@pytest.mark.parametrize("text", ["false", "0", "no"])
def test_booleans_in_variables(text: str) -> None:
    assert read_command(["bundle"], {"BEAMLINE_REFLECTION": text}).settings.reflection is False


@pytest.mark.parametrize(("text", "expected"), [("3", 3), ("auto", "auto")])
def test_numbers_that_can_be_automatic(text: str, expected: object) -> None:
    assert read_command(["bundle", "--workers", text], {}).settings.workers == expected


def test_every_problem_of_every_source_is_reported_at_once(config: Path) -> None:
    config.write_text('max_rows = "128"\nmax_row = 5\nworkers = true\nlog_level = "loud"\n')
    environment = {"BEAMLINE_GRPC_PORT": "70000", "BEAMLINE_GRCP_PORT": "1", "BEAMLINE_host": "x", "OTHER": "y"}
    argv = ["--device", "tpu", "--max-beam-size=0", "--lame-duck-s", "nan", "--what", "--config", str(config)]
    assert problems(argv, environment) == [
        f"{config}: max_row: unknown; did you mean max_rows?",
        f"{config}: workers: True is not valid; expected a whole number of at least 1 or auto",
        f"{config}: max_rows: '128' is not valid; expected a whole number of at least 1",
        f"{config}: log_level: 'loud' is not valid; expected one of debug, info, warning, error",
        "BEAMLINE_GRCP_PORT: unknown; did you mean grpc_port?",
        "BEAMLINE_host: unknown; did you mean host?",
        "BEAMLINE_GRPC_PORT: '70000' is not valid; expected a whole number from 0 to 65535",
        "--what: unknown argument",
        "BUNDLE: missing; expected the folder that `beamline export` has written",
        "--device: 'tpu' is not valid; expected one of auto, cpu, cuda",
        "--max-beam-size: '0' is not valid; expected a whole number from 1 to 16",
        "--lame-duck-s: 'nan' is not valid; expected a number from 0 to 3600",
    ]


def test_a_problem_is_told_although_a_flag_replaces_the_value() -> None:
    assert problems(["bundle", "--grpc-port", "1"], {"BEAMLINE_GRPC_PORT": "x"}) == [
        "BEAMLINE_GRPC_PORT: 'x' is not valid; expected a whole number from 0 to 65535"
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--metrics-port", "8001"], "grpc_port (default), --metrics-port: both are 8001; two services need two ports"),
        (
            ["--max-rows", "8"],
            "max_beam_size (default), --max-rows: a beam of 16 does not fit into 8 rows; widen one or narrow the other",
        ),
        (
            ["--max-message-bytes", "2048"],
            "max_text_bytes (default), --max-message-bytes: a text of 65536 bytes does not fit into a message of "
            "2048 bytes",
        ),
        (
            ["--request-batch", "8"],
            "--request-batch, request_batch_delay_ms (default): one is nothing without the other; set both or neither",
        ),
        (
            ["--request-batch-delay-ms", "0"],
            "request_batch (default), --request-batch-delay-ms: one is nothing without the other; set both or neither",
        ),
        (
            ["--request-batch=129", "--request-batch-delay-ms=2"],
            "--request-batch, max_rows (default): 129 requests never fit into 128 rows together; ask for fewer",
        ),
    ],
)
def test_contradictions_name_what_is_involved(argv: list[str], expected: str) -> None:
    assert problems(["bundle", *argv], {}) == [expected]


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--host", "", "text, not empty"),
        ("--max-duration-s", "0", "a number above 0, at most 86400"),
        ("--model-name", "a b", "text that matches ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),
        ("--kv-slots", "0", "a whole number of at least 1 or auto"),
        ("--request-batch", "0", "a whole number of at least 1"),
        ("--request-batch-delay-ms", "-1", "a number from 0 to 60000"),
    ],
)
def test_what_is_valid_is_told_in_words(flag: str, value: str, expected: str) -> None:
    assert problems(["bundle", flag, value], {}) == [f"{flag}: {value!r} is not valid; expected {expected}"]


def test_request_level_batching_is_set_everywhere_alike(config: Path) -> None:
    config.write_text("request_batch_delay_ms = 2.5\n")
    settings = read_command(["bundle", "--config", str(config)], {"BEAMLINE_REQUEST_BATCH": "32"}).settings
    assert (settings.request_batch, settings.request_batch_delay_ms) == (32, 2.5)


def test_two_free_ports_are_no_contradiction() -> None:
    assert read_command(["bundle", "--grpc-port", "0", "--metrics-port", "0"], {}).settings.grpc_port == 0


@pytest.mark.parametrize("content", [b"max_rows = ", b"\xff\xfe"], ids=["syntax", "encoding"])
def test_a_file_that_is_not_toml(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    [problem] = problems(["bundle", "--config", str(config)], {})
    assert problem.startswith(f"{config}: is not TOML (")


def test_a_file_that_is_not_there(config: Path) -> None:
    [problem] = problems(["bundle"], {"BEAMLINE_CONFIG": str(config)})
    assert problem == f"{config}: cannot be read (No such file or directory); expected a TOML file"


def test_unknown_flags_suggest_known_ones() -> None:
    assert problems(["bundle", "--grcp-port=1"], {}) == ["--grcp-port=1: unknown argument; did you mean --grpc-port?"]


def test_a_flag_without_its_value() -> None:
    assert problems(["bundle", "--grpc-port"], {}) == ["argument --grpc-port: expected one argument"]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(Settings(), "grpc_port", 1)  # noqa: B010 - mypy knows that it must not work
