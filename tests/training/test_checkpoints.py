"""Which checkpoint is continued from, and where new ones may go."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from rtrl_moe_pl.training.checkpoints import (
    PER_RANK,
    DurableCheckpointIO,
    newest_readable,
    require_readable,
    require_writable,
)

VERSION = {"pytorch-lightning_version": "2.6.0"}


def write(path: Path, time: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**VERSION, "state_dict": {"weight": torch.randn(100)}}, path)
    os.utime(path, (time, time))
    return path


def test_what_was_saved_last_is_the_newest_whatever_the_time_of_the_file(tmp_path: Path) -> None:
    """A copied folder has the times of the copy, in any order."""
    older, newer = tmp_path / "a" / "last-step9.ckpt", tmp_path / "b" / "last-step10.ckpt"
    for path in (older, newer):
        DurableCheckpointIO().save_checkpoint({**VERSION, "state_dict": {}}, path)
    os.utime(newer, (100, 100))
    assert newest_readable(tmp_path) == newer


def test_one_that_a_running_training_removes_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = write(tmp_path / "older.ckpt", 100), write(tmp_path / "newer.ckpt", 200)
    load = torch.load

    def removing(path: Path, **options: Any) -> Any:
        found = load(path, **options)
        newer.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(torch, "load", removing)
    assert newest_readable(tmp_path) == older


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
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint .* \(.*c.ckpt is no checkpoint of a training"):
        newest_readable(tmp_path)


def flip_a_stored_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # in the middle of the tensor, which is most of the file
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_stored_byte, truncate, empty])
def test_damage_is_found(tmp_path: Path, damage) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({**VERSION, "state_dict": {"weight": torch.randn(10_000)}}, path)
    require_readable(path)
    damage(path)
    with pytest.raises(ValueError, match=r"truncated or corrupt|is an empty file"):
        require_readable(path)


def test_a_whole_one_beside_a_damaged_one_is_offered(tmp_path: Path) -> None:
    older = write(tmp_path / "last-step1.ckpt", 100)
    truncate(write(tmp_path / "last-step2.ckpt", 200))
    with pytest.raises(ValueError, match=f"last-step2.ckpt is truncated .*; the newest whole one beside it is {older}"):
        require_readable(tmp_path / "last-step2.ckpt")


def test_a_healthy_file_that_is_no_checkpoint_is_not_called_damaged(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list\.ckpt is no checkpoint of a training: it holds no state_dict$"):
        require_readable(tmp_path / "list.ckpt")


def test_weights_that_lightning_has_not_saved_are_good_for_another_option(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    require_readable(tmp_path / "weights.ckpt", "model.pretrained")
    with pytest.raises(ValueError, match="it holds no pytorch-lightning_version"):
        require_readable(tmp_path / "weights.ckpt")


def test_a_folder_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder: give a checkpoint, or last"):
        require_readable(tmp_path)


def test_a_run_goes_on_from_whole_states_and_not_from_weights_alone(tmp_path: Path) -> None:
    torch.save({**VERSION, "state_dict": {}, "optimizer_states": []}, tmp_path / "whole.ckpt")
    weights = write(tmp_path / "weights.ckpt", 2e9)
    assert newest_readable(tmp_path) == weights
    with pytest.warns(UserWarning, match=r"weights\.ckpt is no checkpoint of a training: it holds no optimizer_states"):
        assert newest_readable(tmp_path, resumable=True) == tmp_path / "whole.ckpt"


def test_a_checkpoint_without_the_shard_of_a_rank_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({**VERSION, "state_dict": {}, PER_RANK: {"world_size": 3}}, path)
    torch.save({PER_RANK: {}}, tmp_path / "a.ckpt.rank1")
    with pytest.raises(ValueError, match=r"a\.ckpt is incomplete: its shard a\.ckpt\.rank2 does not exist"):
        require_readable(path)
    torch.save({PER_RANK: {}}, tmp_path / "a.ckpt.rank2")
    require_readable(path)
    for other in ({"global_step": 4}, {"batches": 4}):
        torch.save({PER_RANK: other}, tmp_path / "a.ckpt.rank2")
        with pytest.raises(ValueError, match=r"its shard a\.ckpt\.rank2 is of another step or batch"):
            require_readable(path)
    torch.save({"another": "file"}, tmp_path / "a.ckpt.rank2")
    torch.save({**VERSION, "state_dict": {}, PER_RANK: {"world_size": 3, "global_step": 4}}, path)
    torch.save({PER_RANK: {"global_step": 4}}, tmp_path / "a.ckpt.rank1")
    with pytest.raises(ValueError, match=r"its shard a\.ckpt\.rank2 is of another step or batch"):
        require_readable(path)
    empty(tmp_path / "a.ckpt.rank1")
    with pytest.raises(ValueError, match=r"its shard a\.ckpt\.rank1 is an empty file"):
        require_readable(path)


def test_writing_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    writer = DurableCheckpointIO()
    writer.save_checkpoint({**VERSION, "state_dict": {"weight": torch.ones(3)}}, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\.ckpt: .*earlier checkpoints are untouched"):
            writer.save_checkpoint({**VERSION, "state_dict": {"weight": torch.ones(100_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]
    assert torch.equal(torch.load(path)["state_dict"]["weight"], torch.ones(3))


def test_what_is_written_is_on_the_disk_before_it_is_renamed_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a failure of power could leave a half one under the final name, or the earlier one."""
    done, flush, replace = [], os.fsync, Path.replace

    def flushed(handle: int) -> None:
        found = os.fstat(handle)
        done.append("folder" if os.path.samestat(found, tmp_path.stat()) else found.st_size)
        flush(handle)

    def renamed(path: Path, to: Path) -> Path:
        done.append("renamed")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    DurableCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(3)}}, tmp_path / "a.ckpt")
    assert done == [(tmp_path / "a.ckpt").stat().st_size, "renamed", "folder"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.ckpt"):
        require_readable(tmp_path / "gone.ckpt")


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"trainer\.default_root_dir: cannot write to .*file"):
        require_writable(tmp_path / "file" / "folder")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match=r"trainer\.default_root_dir: cannot write to .*link"):
        require_writable(tmp_path / "link")
