"""What installed packages offer."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint

import pytest

from sdeblend.shell import registry


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint(name, "json:dumps", "group") for name in ("b", "a")] + [EntryPoint("c", "nowhere:x", "group")]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == "group" else [])


def test_offers_are_in_order_and_not_imported(installed: None) -> None:
    assert list(registry.offered("group")) == ["a", "b", "c"]
    assert registry.offered("other") == {}


def test_what_is_asked_for_is_imported(installed: None) -> None:
    assert registry.load("group", "a", what="kind")([1]) == "[1]"
    with pytest.raises(ModuleNotFoundError):
        registry.load("group", "c", what="kind")


def test_an_unknown_name_is_refused_with_the_known(installed: None) -> None:
    with pytest.raises(ValueError, match=r"^f\.toml: \[backend\] kind must be one of a, b, c, got 'd'$"):
        registry.load("group", "d", what="f.toml: [backend] kind")
    with pytest.raises(ValueError, match=r"^kind must be one of none \(none is installed\), got 'd'$"):
        registry.load("other", "d", what="kind")


def test_this_project_offers_its_own() -> None:
    assert {"toy", "verify", "generate", "evaluate", "compare", "finetune"} <= set(registry.offered(registry.COMMANDS))
    for group in (registry.BACKENDS, registry.TUNABLES):
        assert {"mixture", "pipeline"} <= set(registry.offered(group))
        assert callable(registry.load(group, "mixture", what="kind"))


def test_versions_are_of_what_is_installed() -> None:
    found = registry.versions(["torch", "sdeblend-is-not-this", "numpy"])
    assert list(found) == ["torch", "numpy"]
    assert found["numpy"] == importlib.metadata.version("numpy")
