"""Settings: precedence, all errors at once, nearest matches, and a printed form that reads back."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from serve.config import ConfigError, Settings, env_name, load, option_name


def settings(*argv: str, env: dict[str, str] | None = None) -> Settings:
    return load(argv, {} if env is None else env).settings


def test_defaults_are_the_contract() -> None:
    s = settings()
    assert (s.host, s.port, s.grpc_port) == ("127.0.0.1", 8000, 50051)
    assert (s.max_input_tokens, s.max_output_tokens, s.default_max_tokens) == (2048, 512, 256)
    assert (s.max_queued_requests, s.shutdown_grace_seconds, s.request_timeout_seconds) == (256, 30.0, 0.0)
    assert (s.keepalive_seconds, s.max_body_mib, s.ui, s.cors_origins, s.api_keys) == (15.0, 8.0, True, (), ())


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\ngrpc_port = 2\nmax-input-tokens = 3\nserved-model-name = ["a", "b"]\n')
    env = {"FLAN_SERVE_PORT": "11", "FLAN_SERVE_GRPC_PORT": "12", "FLAN_SERVE_CONFIG": str(file)}
    s = settings("--port", "21", env=env)
    assert (s.port, s.grpc_port, s.max_input_tokens, s.max_output_tokens) == (21, 12, 3, 512)
    assert s.served_model_names == ("a", "b")


def test_every_option_is_flag_variable_and_key() -> None:
    specs = fields(Settings)
    assert len(specs) == 28
    assert len({option_name(spec) for spec in specs}) == len({env_name(spec) for spec in specs}) == 28
    assert all(re.fullmatch(r"FLAN_SERVE_[A-Z_]+", env_name(spec)) for spec in specs)


def test_lists_repeat_as_flags_and_are_comma_separated_in_the_environment() -> None:
    assert settings("--api-key", "one", "--api-key", "two").api_keys == ("one", "two")
    assert settings(env={"FLAN_SERVE_API_KEY": "one, two"}).api_keys == ("one", "two")


def test_booleans() -> None:
    assert settings("--no-ui").ui is False
    assert settings(env={"FLAN_SERVE_UI": "off"}).ui is False
    assert settings("--ui", env={"FLAN_SERVE_UI": "0"}).ui is True


def test_grpc_can_be_switched_off() -> None:
    assert settings("--grpc-port", "-1").grpc_port == -1


def test_all_errors_at_once_with_nearest_matches(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("max-imput-tokens = 3\nport = 1.5\n")
    with pytest.raises(ConfigError) as caught:
        settings(
            "--portt=3", "--dtype", "flaot32", "--max-queued-requests=-1", "--config", str(file),
            env={"FLAN_SERVE_PROT": "1", "FLAN_SERVE_UI": "maybe"},
        )  # fmt: skip
    errors = caught.value.errors
    assert len(errors) == 7
    text = "\n".join(errors)
    assert "unknown option --portt; did you mean --port?" in text
    assert "FLAN_SERVE_PROT; did you mean FLAN_SERVE_PORT?" in text
    assert "unknown key 'max-imput-tokens'; did you mean max-input-tokens?" in text
    assert "did you mean float32?" in text
    assert "--max-queued-requests: must be at least 0" in text
    assert "port (config file): must be a whole number, not 1.5" in text
    assert "FLAN_SERVE_UI: must be true or false, not 'maybe'" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "70000"], "--port: must be between 0 and 65535"),
        (["--port", "x"], "--port: must be a whole number"),
        (["--port"], "expected one argument"),
        (["--shutdown-grace-seconds", "nan"], "--shutdown-grace-seconds: must be at least 0"),
        (["--tls-cert", __file__], "--tls-cert and --tls-key go together"),
        (["--tls-client-ca", __file__], "--tls-client-ca needs --tls-cert"),
        (["--tls-key", "/nowhere/key.pem", "--tls-cert", __file__], "--tls-key: no such file: /nowhere/key.pem"),
        (["--exemplars", "/nowhere"], "--exemplars: no such folder"),
        (["--port", "9", "--grpc-port", "9"], "must differ"),
        (["--max-output-tokens", "8", "--default-max-tokens", "9"], "must be at most"),
        (["--config", "/nowhere.toml"], "--config /nowhere.toml: No such file"),
        (["surplus"], "unexpected argument 'surplus'"),
    ],
)
def test_bad_settings(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings(*argv)


def test_printed_config_reads_back_and_hides_keys(tmp_path: Path) -> None:
    s = settings("--api-key", "geheim", "--port", "0", "--cors-origin", "https://a.example")
    text = s.describe()
    assert "geheim" not in text
    file = tmp_path / "printed.toml"
    file.write_text(text)
    assert tomllib.loads(text)["api-key"] == ["***"]
    again = settings("--config", str(file), "--api-key", "geheim")
    assert again == s


def test_a_printed_config_gives_no_key_that_can_be_guessed(tmp_path: Path) -> None:
    file = tmp_path / "printed.toml"
    file.write_text(settings("--api-key", "geheim").describe())
    with pytest.raises(ConfigError, match=re.escape("--api-key: *** is what --print-config shows")):
        settings("--config", str(file))


@pytest.mark.parametrize(
    ("argv", "file", "env"),
    [
        (["--api-keyy", "geheim"], "", {}),
        (["--api-keyy=geheim"], "", {}),
        ([], 'api-key = [1, "geheim"]', {}),
        ([], 'api_keys = ["geheim"]', {}),
        ([], 'api-key = {name = "geheim"}', {}),
        ([], "", {"FLAN_SERVE_API_KEYS": "geheim"}),
    ],
)
def test_a_mistake_about_a_key_does_not_show_it(
    argv: list[str], file: str, env: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(file)
    with pytest.raises(ConfigError) as caught:
        settings("--config", str(path), *argv, env=env)
    assert "api" in str(caught.value).lower()
    assert "geheim" not in str(caught.value)


def test_help_gives_each_option_its_meaning_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    blocks = [" ".join(block.split()) for block in re.split(r"\n(?=  -)|\n\n", text)]  # unwrapped
    told = {block.split()[0].rstrip(","): block for block in blocks if block.startswith("--")}
    for spec in fields(Settings):
        line = told[f"--{option_name(spec)}"]
        assert spec.metadata["help"] in line
        assert re.search(r"\(default: .+\)$", line), line
        if isinstance(spec.default, float):
            assert "SECONDS" in line or "MiB" in line
            assert "in seconds" in line or "in MiB" in line
        for unit in ("tokens", "sequences", "requests"):
            assert unit not in spec.name or unit.rstrip("s") in spec.metadata["help"]
    for word in ("FLAN_SERVE_<NAME>", "--config", "flag > environment > file > default", "OTEL_"):
        assert word in " ".join(text.split())


def test_print_config_is_asked_for() -> None:
    assert load(["--print-config"], {}).print_config is True
