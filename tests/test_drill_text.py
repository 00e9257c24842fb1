"""Where the drill's text comes from, and what is said when there is none."""

from __future__ import annotations

import pytest

import fault_a2a
from fault_a2a.cli.drill import text


def test_the_readme_is_the_default():
    words, name = text.read_text(None)
    assert name == "README.md" and "fault_a2a" in words


def test_an_installed_package_brings_a_text(monkeypatch, tmp_path):
    """Beside site-packages there may be somebody else's README."""
    (tmp_path / "README.md").write_text("not ours")
    monkeypatch.setattr(fault_a2a, "__file__", str(tmp_path / "fault_a2a" / "__init__.py"))
    words, name = text.read_text(None)
    assert "not ours" not in words and len(words.split()) > 200 and name == "the text that comes with it"


def test_a_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"caf\xc3\xa9 and \xff more")
    words, name = text.read_text(str(path))
    assert words.startswith("café and") and name == "words.txt"


def test_refusals(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    with pytest.raises(ValueError, match=r"^--text .*empty.txt: it has no word in it"):
        text.read_text(str(empty))
    with pytest.raises(ValueError, match=r"^--text .*: Is a directory"):
        text.read_text(str(tmp_path))
