"""A run through a curriculum that is killed and resumed goes on as an unbroken one, wherever it was killed."""

from pathlib import Path

import pytest
import torch

from tests.data.curriculum_run import Scripted, haystack, trainer

# A resumed run saves under another folder, and the next one into the same: intended.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")


@pytest.mark.parametrize(
    ("good", "options", "window"),
    [
        ({3, 6}, {}, None),
        ({3, 6}, {}, 5),
        ({2, 5}, {"val_check_interval": 1}, 5),  # in mid-epoch
        ({4}, {"limit_train_batches": 2}, None),
        ({6}, {"check_val_every_n_epoch": 2}, None),
        ({4, 8}, {"check_val_every_n_epoch": None, "val_check_interval": 4}, 5),
    ],
    ids=["end", "windows", "inside", "limited", "every-second", "every-four-batches"],
)
def test_resumed_equals_unbroken(tmp_path: Path, good: set[int], options: dict, window: int | None):
    """From every checkpoint, the one between the last batch of an epoch and its validation among them."""
    unbroken, size = Scripted(good), {"batches_per_epoch": 3, "validation_window": window}
    trainer(tmp_path, max_epochs=4, **options).fit(unbroken, datamodule=haystack(**size))
    assert len(set(unbroken.lengths)) == len(good) + 1
    total = len(unbroken.seen)
    checkpoints = [path for path in sorted(tmp_path.glob("*/*.ckpt")) if steps_of(path) < total]
    assert {steps_of(path) for path in checkpoints} == set(range(1, total))
    for path in checkpoints:
        step, resumed = steps_of(path), Scripted(good)
        again = trainer(max_epochs=4, **options)
        again.fit(resumed, datamodule=haystack(**size), ckpt_path=str(path))
        assert resumed.lengths == unbroken.lengths[step:], path
        assert resumed.seen == unbroken.seen[step:], path
        due = step if path.parent.name == "step" else step + 1  # a validation after this step is made good
        later = [[part for part in run.validated if part[0] >= due] for run in (unbroken, resumed)]
        assert later[0] == later[1], path


def steps_of(path: Path) -> int:
    return int(path.stem.split("-")[0].removeprefix("step="))


def test_resumed_twice_between_a_batch_and_its_validation(tmp_path: Path):
    """The validation that is made good writes a checkpoint of its own."""
    unbroken, first, second = Scripted({4, 12}), Scripted({4, 12}), Scripted({4, 12})
    trainer(tmp_path / "a").fit(unbroken, datamodule=haystack())
    trainer(tmp_path / "b").fit(first, datamodule=haystack(), ckpt_path=str(tmp_path / "a/step/step=4.ckpt"))
    trainer(tmp_path / "c").fit(second, datamodule=haystack(), ckpt_path=str(tmp_path / "b/validated/step=4.ckpt"))
    assert first.seen == second.seen == unbroken.seen[4:]


def test_without_the_saved_stage_the_runs_differ(tmp_path: Path):
    """Negative control: the comparison sees a run that has forgotten its stage."""
    unbroken, resumed = Scripted({4, 12}), Scripted({4, 12})
    trainer(tmp_path).fit(unbroken, datamodule=haystack())
    state = torch.load(tmp_path / "step" / "step=6.ckpt", weights_only=True)  # plain types only
    assert state["HaystackDataModule"].pop("curriculum") == {"length": 16, "passed": False, "validation_due": False}
    torch.save(state, tmp_path / "stripped.ckpt")
    with pytest.warns(UserWarning, match="training data have changed since the checkpoint"):
        trainer().fit(resumed, datamodule=haystack(), ckpt_path=str(tmp_path / "stripped.ckpt"))
    assert resumed.seen != unbroken.seen[6:]
    assert resumed.lengths[0] == 8


def test_lengths_may_be_added_between_two_runs(tmp_path: Path):
    trainer(tmp_path).fit(Scripted({4, 12}), datamodule=haystack())
    longer = Scripted({22})
    run = trainer(max_epochs=6)
    run.fit(longer, datamodule=haystack(curriculum=[16, 32], length=64), ckpt_path=str(tmp_path / "step/step=18.ckpt"))
    assert longer.lengths == [32] * 6
