"""A folder with configurations, in which bad input is given."""

from pathlib import Path

import pytest

from tests.bad_input.case import CONFIG, MOE


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RTRL_MOE_PL_DEBUG", raising=False)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "moe.yaml").write_text(MOE)
    return tmp_path
