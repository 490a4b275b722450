"""Settings: where they come from, which wins, and what a wrong one says."""

from pathlib import Path

import pytest

from nexus.config import load_config
from nexus.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import os

    for name in list(os.environ):
        if name.startswith("NEXUS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    return tmp_path


def write(folder: Path, text: str) -> Path:
    file = folder / "nexus.yaml"
    file.write_text(text)
    return file


def test_defaults_are_one_machine_on_loopback(clean_home: Path) -> None:
    config = load_config()
    assert (config.home, config.url) == (clean_home / "home", "http://127.0.0.1:8000")
    assert (config.stores.vectors, config.stores.documents) == ("milvus-lite:", "sqlite:")
    assert config.models.generator == "extractive:"


def test_the_environment_wins_over_the_file_leaf_by_leaf(clean_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(clean_home, "http:\n  port: 1234\n  max_body_bytes: 99\n")
    monkeypatch.setenv("NEXUS_HTTP__PORT", "4321")
    config = load_config(file)
    assert (config.http.port, config.http.max_body_bytes) == (4321, 99)


def test_the_home_s_own_file_is_read(clean_home: Path) -> None:
    (clean_home / "home").mkdir()
    write(clean_home / "home", "retrieval:\n  candidates: 7\n")
    assert load_config().retrieval.candidates == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http: [", "not valid YAML"), ("- a", "must hold sections"), ("http: 3", "'http' is a section"),
        ("htp: {}", "htp"), ("http:\n  prot: 1", "http.prot"), ("http:\n  port: high", "http.port"),
        ("http:\n  port: 99999", "http.port"), ("http:\n  host: 0.0.0.0", "loopback"), ("\x00", "not valid YAML"),
        ("retrieval:\n  fusion: magic", "retrieval.fusion"), ("graph:\n  shared_metadata: [a=b]", "graph.shared"),
    ],
)  # fmt: skip
def test_a_broken_file_says_where_and_what(clean_home: Path, text: str, words: str) -> None:
    file = write(clean_home, text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_not_skipped(clean_home: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(clean_home / "missing.yaml")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("NEXUS_HTP__PORT", "1", "NEXUS_HTP__PORT.*NEXUS_HTTP__PORT"), ("NEXUS_HTTP__PORT", "x", "NEXUS_HTTP__PORT"),
        ("NEXUS_HTTP", "[", "environment"), ("NEXUS_HTTP__PROT", "1", "NEXUS_HTTP__PROT"),
        ("NEURAL_ENGINE_BACKEND", "magic", "NEURAL_ENGINE_BACKEND"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=words):
        load_config()


def test_aliases_of_the_founding_documents_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OPENAI_API_KEY": "sk-1", "VALID_API_KEYS": "a, b", "ALLOWED_ORIGINS": "https://x.example",
        "NEURAL_ENGINE_BACKEND": "local", "LOCAL_MODEL_PATH": "/models/m.gguf",
        "PHOENIX_COLLECTOR_ENDPOINT": "http://127.0.0.1:6006",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    config = load_config()
    assert config.models.api_key is not None and config.models.api_key.get_secret_value() == "sk-1"
    assert [key.get_secret_value() for key in config.access.development_keys] == ["a", "b"]
    assert config.http.allowed_origins == ("https://x.example",)
    assert config.models.generator == "gguf:/models/m.gguf"


def test_a_relative_home_is_made_absolute_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_HOME", "some/home")
    assert load_config().home == Path.cwd() / "some" / "home"
    monkeypatch.setenv("NEXUS_HOME", "")
    assert load_config().home.name == "nexus" and load_config().home.is_absolute()


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    config = load_config()
    assert "sk-secret" not in repr(config) + config.model_dump_json()


def test_a_config_cannot_be_changed() -> None:
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.http = None  # type: ignore[assignment, misc]


def test_voters_that_are_named_are_all_there_are(clean_home: Path) -> None:
    config = load_config(write(clean_home, "coordinator:\n  voters:\n    2: {rack: a}\n    5: {}\n"))
    assert config.voters == {2: {"rack": "a"}, 5: {}}


def test_without_voters_named_there_is_one_or_in_a_cluster_one_on_each_of_three_machines(clean_home: Path) -> None:
    assert load_config().voters == {1: {}}
    nodes = "".join(f"  {name}: {{address: {name}.example, cpus: 2, memory: 1GiB}}\n" for name in "abcd")
    config = load_config(write(clean_home, f"ray: {{head: a}}\nnodes:\n{nodes}"))
    assert config.voters == {number: {"nexus.io/node": name} for number, name in enumerate("abc", 1)}
