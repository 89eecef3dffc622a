"""Which checkpoint is continued from, and where new ones may go."""

import os
from pathlib import Path

import pytest
import torch

from rtrl_moe_pl.training.checkpoints import newest_readable, require_readable, require_writable


def write(path: Path, time: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"weight": torch.randn(100)}}, path)
    os.utime(path, (time, time))
    return path


def test_the_newest_is_taken_whatever_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "lightning_logs/version_10/checkpoints/last.ckpt", 100)
    newest = write(tmp_path / "lightning_logs/version_9/checkpoints/best-step3.ckpt", 200)
    assert newest_readable(tmp_path) == newest


def test_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    complete = write(tmp_path / "a.ckpt", 100)
    truncated = write(tmp_path / "b.ckpt", 200)
    truncated.write_bytes(truncated.read_bytes()[:-50])
    (tmp_path / "c.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"truncated or corrupt .*: passed over, an older one is taken") as found:
        assert newest_readable(tmp_path) == complete
    assert {name for name in "abc" for warning in found if f"{name}.ckpt" in str(warning.message)} == {"b", "c"}


def test_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint .* \(1 damaged\)"):
        newest_readable(tmp_path)


def flip_a_stored_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # in the middle of the tensor, which is most of the file
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_content(path: Path) -> None:
    torch.save([1, 2], path)


@pytest.mark.parametrize("damage", [flip_a_stored_byte, truncate, empty, other_content])
def test_damage_is_found(tmp_path: Path, damage) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"weight": torch.randn(10_000)}}, path)
    require_readable(path)
    damage(path)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        require_readable(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.ckpt"):
        require_readable(tmp_path / "gone.ckpt")


def test_writable_folders_are_made(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"trainer\.default_root_dir: cannot write to .*file"):
        require_writable(tmp_path / "file" / "folder")
