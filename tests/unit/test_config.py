import os
import re
from pathlib import Path
from typing import NoReturn

import pytest

from exo.config import Access, ApiKey, Limits, Settings, variables_without_effect
from exo.config_values import SettingsError
from tests import ROOT


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing is set but HOME."""
    for name in list(os.environ):
        if name.startswith(("EXO_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_defaults_are_local_and_upstreams(home: Path) -> None:
    settings = Settings.load()
    assert (settings.host, settings.port) == ("127.0.0.1", 52415)
    assert settings.models_directory == home / ".local/share/exo/models"
    assert settings.models_directories == (settings.models_directory,)
    assert settings.cards_directory == home / ".local/share/exo/custom_model_cards"
    assert settings.log_directory == home / ".cache/exo/exo_log/runner_log"


def test_flag_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXO_HOST", "0.0.0.0")
    monkeypatch.setenv("EXO_PORT", "8000")
    monkeypatch.setenv("EXO_DEFAULT_MODELS_DIR", str(tmp_path / "environment"))
    assert (Settings.load().host, Settings.load().port) == ("0.0.0.0", 8000)
    assert Settings.load().models_directory == tmp_path / "environment"
    settings = Settings.load(host="::1", port=9000, models_directory=tmp_path / "flag")
    assert (settings.host, settings.port) == ("::1", 9000)
    assert settings.models_directories == (tmp_path / "flag",)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Settings.load()
    for name in ("EXO_HOST", "EXO_PORT", "EXO_HOME", "EXO_DEFAULT_MODELS_DIR", "EXO_MODELS_DIRS", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, "")
    assert Settings.load() == before


def test_models_are_searched_read_only_first_then_default_then_others(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("EXO_MODELS_READ_ONLY_DIRS", "/mnt/a:~/b:")
    monkeypatch.setenv("EXO_MODELS_DIRS", "/mnt/c:/mnt/a")
    default = home / ".local/share/exo/models"
    assert Settings.load().models_directories == (Path("/mnt/a"), home / "b", default, Path("/mnt/c"))


def test_xdg_directories_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    settings = Settings.load()
    assert settings.models_directory == Path("/data/exo/models")
    assert settings.log_directory == Path("/cache/exo/exo_log/runner_log")


@pytest.mark.parametrize(
    ("value", "expected"), [(".elsewhere", "HOME/.elsewhere"), ("/exo", "/exo"), ("~/x", "HOME/x")]
)
def test_exo_home_holds_everything(monkeypatch: pytest.MonkeyPatch, home: Path, value: str, expected: str) -> None:
    monkeypatch.setenv("EXO_HOME", value)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    settings = Settings.load()
    root = Path(expected.replace("HOME", str(home)))
    assert settings.models_directory == root / "models"
    assert settings.cards_directory == root / "custom_model_cards"
    assert settings.log_directory == root / "exo_log/runner_log"


def test_relative_directories_hold_wherever_a_runner_is_started(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.chdir(home)
    assert Settings.load(models_directory="models").models_directory == home / "models"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("EXO_PORT", "http", "0 to 65535"),
        ("EXO_PORT", "65536", "0 to 65535"),
        ("EXO_PORT", "-1", "0 to 65535"),
        ("EXO_PORT", "9" * 5000, "0 to 65535"),
        ("EXO_HOST", "https://localhost", "host name or address"),
        ("XDG_DATA_HOME", "data", "absolute"),
        ("EXO_MODELS_DIRS", "~nobody-of-this-name/models", "home directory"),
        ("EXO_HOME", __file__, "directory"),
        ("EXO_MODELS_READ_ONLY_DIRS", f"/mnt:{__file__}", "directory"),
    ],
)
def test_a_bad_variable_is_named_with_value_and_remedy(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as error:
        Settings.load()
    message = str(error.value)
    assert message.startswith(f"{variable}: ")
    assert expected in message
    assert value.split(":")[-1] in message


def test_exo_home_is_enough_without_a_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_entry(_: int) -> NoReturn:  # as in many containers
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.raises(SettingsError, match="HOME"):
        Settings.load()
    monkeypatch.setenv("EXO_HOME", str(tmp_path / "exo"))
    assert Settings.load().models_directory == tmp_path / "exo/models"


def test_the_current_directory_is_needed_for_relative_paths_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Settings.load(models_directory="/models").models_directory == Path("/models")
    with pytest.raises(SettingsError, match=r"^--models-dir: .*current directory"):
        Settings.load(models_directory="models")


def test_a_directory_that_json_cannot_carry_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = f"{tmp_path}/{os.fsdecode(b'caf' + bytes([0xE9]))}"
    for variable in ("EXO_DEFAULT_MODELS_DIR", "EXO_HOME", "HOME"):
        monkeypatch.setenv(variable, path)
        with pytest.raises(SettingsError, match=f"{variable}: .*UTF-8") as error:
            Settings.load()
        str(error.value).encode()
        monkeypatch.delenv(variable)


def test_a_bad_flag_is_named_even_where_the_variable_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXO_PORT", "8000")
    with pytest.raises(SettingsError, match=r"^--port: .*70000"):
        Settings.load(port=70000)
    with pytest.raises(SettingsError, match=r"^--host: "):
        Settings.load(host="")
    with pytest.raises(SettingsError, match=r"^--models-dir: "):
        Settings.load(models_directory="")


def test_limits_come_from_flags_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().limits == Limits(max_queue=256, drain_seconds=30, stall_seconds=60)
    monkeypatch.setenv("EXO_MAX_QUEUE", "7")
    monkeypatch.setenv("EXO_DRAIN_TIMEOUT", "0.5")
    monkeypatch.setenv("EXO_STALL_TIMEOUT", "9")
    monkeypatch.setenv("EXO_LOAD_TIMEOUT", "20")
    assert Settings.load().limits == Limits(max_queue=7, drain_seconds=0.5, stall_seconds=9, load_seconds=20)
    monkeypatch.delenv("EXO_LOAD_TIMEOUT")
    assert Limits.load(max_queue="0", drain=2, stall="3") == Limits(max_queue=0, drain_seconds=2, stall_seconds=3)


@pytest.mark.parametrize("variable", ["EXO_MAX_QUEUE", "EXO_DRAIN_TIMEOUT", "EXO_STALL_TIMEOUT", "EXO_LOAD_TIMEOUT"])
@pytest.mark.parametrize("value", ["-1", "x", "1e9", "9999999", "nan"])
def test_a_limit_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"{variable}.*{value}"):
        Limits.load()


def test_keys_are_named_or_numbered_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Access.load().keys == ()
    monkeypatch.setenv("EXO_API_KEY", "ci:from-the-environment")
    assert Access.load().keys == (ApiKey("ci", "from-the-environment"),)
    file = tmp_path / "keys"
    file.write_text("# who has which\n\nalice:alices-key\r\nanother-key\n")
    flags = Access.load(keys=["bob:bobs-key-"], key_file=file)
    assert flags.keys == (ApiKey("bob", "bobs-key-"), ApiKey("alice", "alices-key"), ApiKey("key-3", "another-key"))
    assert "alices-key" not in repr(flags)


@pytest.mark.parametrize("key", ["", "short", "with space", "a:b:cccccccccc", "näme:secret-secret", "x" * 600, "n:"])
def test_a_bad_key_is_refused_without_being_repeated(tmp_path: Path, key: str) -> None:
    with pytest.raises(SettingsError, match=r"^--api-key: expected NAME:KEY or KEY") as error:
        Access.load(keys=[key])
    assert not key or key not in str(error.value)
    file = tmp_path / "keys"
    file.write_text(f"good:good-good\n{key}\n" if key else "\n# none\n")
    with pytest.raises(SettingsError, match=r"line 2: expected|holds no key") as error:
        Access.load(key_file=file)
    assert not key or key not in str(error.value)


def test_no_name_and_no_key_may_be_given_twice(tmp_path: Path) -> None:
    for keys in (["a:secret-one", "a:secret-two"], ["a:secret-one", "b:secret-one"]):
        with pytest.raises(SettingsError, match="given twice") as error:
            Access.load(keys=keys)
        assert "secret" not in str(error.value)
    with pytest.raises(SettingsError, match=r"^--api-key-file: .* cannot be read"):
        Access.load(key_file=tmp_path / "none")


def test_bad_access_flags_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^--allowed-host: .*http://x"):
        Access.load(allowed_hosts=["http://x"])
    with pytest.raises(SettingsError, match=r"^--cors-origin: .*page\.example"):
        Access.load(cors_origins=["page.example"])
    with pytest.raises(SettingsError, match=r"^--ssl-keyfile: needs"):
        Access.load(certificate_key=tmp_path)
    with pytest.raises(SettingsError, match=r"^--ssl-certfile: expected a file"):
        Access.load(certificate=tmp_path / "none")


LOCAL = ("127.0.0.1", "127.8.8.8", "::1", "localhost")


@pytest.mark.parametrize("host", [*LOCAL, "0.0.0.0", "::", "192.168.1.5", "myhost", "localhost.evil.example"])
def test_only_loopback_is_local(host: str) -> None:
    assert Settings.load(host=host).is_local is (host in LOCAL)


def test_the_url_is_https_where_there_is_a_certificate() -> None:
    assert Settings.load(host="::1", port=1).url() == "http://[::1]:1"
    settings = Settings.load(port=1, access=Access.load(certificate=Path(__file__)))
    assert settings.url(5) == "https://127.0.0.1:5"


def test_what_is_preferred_is_latency_throughput_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().prefer is None
    assert Settings.load(prefer="latency").prefer == "latency"
    monkeypatch.setenv("EXO_PREFER", "throughput")
    assert Settings.load().prefer == "throughput"
    assert Settings.load(prefer="latency").prefer == "latency"
    with pytest.raises(SettingsError, match=r"--prefer: expected latency or throughput \(got 'speed'\)"):
        Settings.load(prefer="speed")


def test_measured_speeds_are_kept_in_the_state_directory(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert Settings.load().speeds_file == home / ".local/state/exo/speeds.json"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert Settings.load().speeds_file == Path("/state/exo/speeds.json")
    monkeypatch.setenv("EXO_HOME", "/everything")
    assert Settings.load().speeds_file == Path("/everything/speeds.json")


def test_every_variable_that_the_program_reads_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = (path.read_text() for path in (ROOT / "src" / "exo").rglob("*.py"))
    for name in {name for text in sources for name in re.findall(r"\bEXO_[A-Z_]*[A-Z]\b", text)}:
        monkeypatch.setenv(name, "x")
    assert variables_without_effect() == []
