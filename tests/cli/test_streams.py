"""What a process prints where the disk is full."""

from __future__ import annotations

import errno
import resource
import threading
from pathlib import Path
from typing import Any

import pytest

from rtrl_moe_pl.cli.streams import full_disk_in_one_line
from tests.test_cli import here, run  # noqa: F401

OPTIONS = ("--trainer.max_steps", "200", "--trainer.log_every_n_steps", "1", "--trainer.enable_checkpointing", "false")
FULL = OSError(errno.ENOSPC, "No space left on device")


def in_a_thread(error: Exception) -> None:
    def fail() -> None:
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the process's own hook is told of threads."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: found.append(arguments.exc_value))
    return found


@pytest.mark.parametrize("debug", [False, True])
def test_a_disk_that_the_log_fills_ends_the_run_in_one_line(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    seen: list[Any],
    debug: bool,
) -> None:
    hook, limit = threading.excepthook, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        assert run("fit", *OPTIONS, *["--debug"] * debug) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capsys.readouterr().err
    [error] = [line for line in said.splitlines() if "error:" in line]
    assert error == (
        "error: cannot write TensorBoard's events: File too large: make room and go on with --ckpt_path last"
    )
    assert ("Traceback" in said, len(seen)) == (debug, int(debug))
    assert threading.excepthook is hook


def test_a_file_is_named_where_its_name_is_known() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "metrics.csv")
    with pytest.raises(OSError, match=r"^cannot write metrics\.csv: No space left on device: make room"):
        with full_disk_in_one_line():
            raise full


def test_a_log_cut_short_that_ended_no_run_is_warned_of(seen: list[Any]) -> None:
    with pytest.warns(UserWarning, match="cannot write a file: No space left on device: make room"):
        with full_disk_in_one_line():
            in_a_thread(FULL)
    assert seen == []


def test_other_errors_are_left_alone(seen: list[Any]) -> None:
    other, told = ValueError("another"), OSError("cannot write the checkpoint")
    with full_disk_in_one_line():
        in_a_thread(other)
    assert seen == [other]
    for error in (other, told):
        with pytest.raises(type(error), match=str(error)), full_disk_in_one_line():
            raise error
    with pytest.raises(OSError, match="the checkpoint"), full_disk_in_one_line():
        raise told from FULL
