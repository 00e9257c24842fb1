"""Settings of the integrations: each is read, checked, and stands in the table that users are given."""

import re
from pathlib import Path

import pytest

from fault_a2a.config import Config
from fault_a2a.integrations import settings

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "vllm_moe.md"


def test_the_table_has_every_setting_with_its_default_and_meaning() -> None:
    rows = re.findall(r"^\| `(FAULT_A2A_\w+)` \| (\S+) \| (.+) \|$", EXAMPLE.read_text(), re.MULTILINE)
    told = {name: (default, meaning.replace("`", "")) for name, default, meaning in rows}
    assert told == {one.name: (one.default, one.meaning) for one in settings.ALL}


def test_timeouts_are_fields_of_a_config() -> None:
    config = Config(num_experts=4, hidden=16, num_topk=2, num_max_tokens_per_rank=4, **settings.timeouts())
    assert (config.silence_ms, config.construct_timeout_ms) == (2000, 600000)


def test_a_setting_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT_A2A_STALL_MS", "1234")
    assert settings.timeouts()["stall_ms"] == 1234


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FAULT_A2A_VLLM", "yes", "FAULT_A2A_VLLM is 'yes'; set it to 0 or 1"),
        ("FAULT_A2A_ON_FAULT", "", "FAULT_A2A_ON_FAULT is ''; set it to report or serve"),
        ("FAULT_A2A_SILENCE_MS", "2 s", "FAULT_A2A_SILENCE_MS is '2 s'; set it to a whole number"),
        ("FAULT_A2A_SILENCE_MS", "0", "FAULT_A2A_SILENCE_MS is 0; set it to 1 to 86400000"),
    ],
)
def test_a_value_without_meaning_is_named(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (setting,) = (one for one in settings.ALL if one.name == name)
    with pytest.raises(ValueError, match=re.escape(message)):
        setting.value()
