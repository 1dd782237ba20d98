"""Where models are pulled from and to, by the environment."""

from pathlib import Path

import pytest

from exo.config import HubAccess, Settings
from exo.config_values import SettingsError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "EXO_OFFLINE", "HF_HUB_OFFLINE", "EXO_HOME", "EXO_MODELS_DIRS"):
        monkeypatch.delenv(name, raising=False)


def test_the_hub_is_the_librarys_own_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().hub == HubAccess()
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hub/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    access = Settings.load().hub
    assert (access.endpoint, access.token, access.offline) == ("https://mirror.example/hub", "hf_secret", None)
    assert "hf_secret" not in repr(access)


@pytest.mark.parametrize("variable", ["EXO_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_names_the_variable_that_says_so(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for value, offline in (("1", variable), ("True", variable), ("false", None), ("", None)):
        monkeypatch.setenv(variable, value)
        assert HubAccess.load().offline == offline
    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(SettingsError, match=f"^{variable}: expected true or false"):
        HubAccess.load()


@pytest.mark.parametrize("value", ["hub.example", "ftp://hub.example", "https://user@hub.example", "https://a b"])
def test_a_bad_address_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    with pytest.raises(SettingsError, match=r"^HF_ENDPOINT: expected an address"):
        HubAccess.load()


def test_a_bad_token_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_one hf_two")
    with pytest.raises(SettingsError, match=r"^HF_TOKEN: ") as error:
        HubAccess.load()
    assert "hf_one" not in str(error.value)


def test_upstreams_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXO_DEFAULT_MODELS_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("EXO_MODELS_DIRS", f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    monkeypatch.setenv("EXO_MODELS_READ_ONLY_DIRS", str(tmp_path / "shared"))
    settings = Settings.load()
    assert settings.models_directories == tuple(tmp_path / name for name in ("shared", "own", "one", "two"))
    assert settings.read_only_directories == (tmp_path / "shared",)
