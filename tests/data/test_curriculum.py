"""The curriculum of Haystack: when a length is left, and what the next one begins with."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from rtrl_moe_pl.data import AnBnDataModule, CurriculumDataModule, HaystackDataModule
from rtrl_moe_pl.tasks import Haystack
from tests.data.curriculum_run import Scripted, haystack, trainer


def test_a_length_is_left_when_validation_at_it_is_good_enough():
    model, data = Scripted({4, 12}), haystack()
    run = trainer()
    run.fit(model, datamodule=data)
    assert model.lengths == [8] * 4 + [16] * 8 + [32] * 8
    assert data.stage == 2  # and there it stays
    begin = [int(starts.sum()) for starts in model.starts]
    assert begin == [3, 0, 0, 0, 3, 0, 0, 0, *[0] * 4, 3, 0, 0, 0, *[0] * 4]  # every lane anew, at promotions alone
    assert {(step, length) for step, length, _ in model.validated} == {(4, 8), (8, 16), (12, 16), (16, 32), (20, 32)}
    assert len({content for *_, content in model.validated}) == 3  # of each length the same in every validation
    run.test(model, datamodule=data, verbose=False)
    assert model.tested == [32]
    run.validate(model, datamodule=data, verbose=False)
    assert model.validated[-1][1] == 32


def test_good_enough_once_in_an_epoch_is_enough_and_counts_from_its_end():
    model = Scripted({1, 10})
    trainer(val_check_interval=1).fit(model, datamodule=haystack())
    assert model.lengths == [8] * 4 + [16] * 8 + [32] * 8


def test_below_the_threshold_nothing_happens():
    """Negative control: the first length is kept; and with a lower threshold it is left at once."""
    model = Scripted(set())
    trainer().fit(model, datamodule=haystack())
    assert set(model.lengths) == {8}
    model = Scripted(set())
    trainer().fit(model, datamodule=haystack(promote_at=1e-9))
    assert set(model.lengths) == {8}
    model = Scripted({0})  # in the sanity check
    trainer().fit(model, datamodule=haystack())
    assert set(model.lengths) == {8}
    model = Scripted({4, 8})
    trainer().fit(model, datamodule=haystack(promote_at=1.0))
    assert model.lengths == [8] * 4 + [16] * 4 + [32] * 12


def test_length_and_progress_are_logged():
    run = trainer(max_epochs=3)
    run.fit(Scripted({4, 12}), datamodule=haystack())
    assert run.callback_metrics["train/length"] == 16
    assert run.callback_metrics["val/progress"] == 2  # stage 1, all right


def test_every_gap_is_above_twice_the_window_at_every_length():
    """What makes truncation a control holds throughout training, also in what is delivered."""
    window = 16
    data = HaystackDataModule(
        min_gap=2 * window + 1, length=256, curriculum=[64, 128], batch_size=50, layout="sequences"
    )
    seen = []
    for stage in range(3):
        data.stage = stage
        for request, _ in zip(data.train_dataloader(), range(20), strict=False):
            batch = data.on_after_batch_transfer(request, 0)
            tokens = batch.inputs.argmax(-1)
            length = tokens.shape[1]
            gaps = length - 1 - (1 + (tokens == 1).int().argmax(1))  # 1 is the key; Q is last
            assert int(gaps.min()) > 2 * window
            seen.append((length, int(gaps.min())))
    assert {length for length, _ in seen} == {64, 128, 256}
    assert {length for length, gap in seen if gap == 2 * window + 1} >= {64}  # the bound is reached


def test_stages_are_drawn_apart():
    data = haystack(batch_size=200, layout="sequences")
    labels = []
    for stage in range(3):
        data.stage = stage
        labels.append(data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0).targets[0].sum(1))
    assert not torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[1], labels[2])


def test_a_checkpoint_is_validated_at_its_length_and_tested_at_the_last(tmp_path: Path):
    trainer(tmp_path).fit(Scripted({4, 12}), datamodule=haystack())
    model, path = Scripted(set()), str(tmp_path / "step/step=6.ckpt")
    trainer().validate(model, haystack(), ckpt_path=path, verbose=False)
    assert [length for _, length, _ in model.validated] == [16]
    trainer().test(model, haystack(), ckpt_path=path, verbose=False)
    trainer().test(model, haystack(curriculum=None, length=100), ckpt_path=path, verbose=False)
    assert model.tested == [32, 100]


def test_a_second_fit_starts_with_the_first_length():
    data, run = haystack(), trainer(max_epochs=2)
    run.fit(Scripted({4}), datamodule=data)
    again = Scripted({4})
    other = trainer(max_epochs=2)
    other.fit(again, datamodule=data)
    assert again.lengths == [8] * 4 + [16] * 4
    other.fit_loop.max_epochs = 3
    anbn = AnBnDataModule(batches_per_epoch=4, validation_scales=[1])
    other.fit(Scripted(set(range(99))), datamodule=anbn)  # its callback is still there
    assert other.global_step > 8
    assert data.stage == 1


def test_the_best_checkpoint_is_one_of_the_longest_sequences(tmp_path: Path):
    """By accuracy alone, which is as high after 4 steps, it would be the first."""
    best = ModelCheckpoint(tmp_path, monitor="val/progress", mode="max")
    trainer(callbacks=[best]).fit(Scripted({4, 8, 16}), datamodule=haystack())
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] == 16
    assert best.best_model_score == 3


@pytest.mark.parametrize("callback", [ModelCheckpoint, EarlyStopping])
@pytest.mark.parametrize("monitor", ["val/accuracy", "val/loss", "val/accuracy_2x"])
def test_what_falls_at_a_promotion_is_not_monitored(
    callback: type, monitor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # checkpoints go there
    message = rf"^{callback.__name__} monitors {monitor}, which gets worse .*: monitor val/progress"
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[callback(monitor=monitor)]).fit(Scripted(set()), datamodule=haystack())
    one_length = haystack(curriculum=None, validation_scales=[1, 2])
    monitored = callback(monitor="val/accuracy")  # without a curriculum, why not
    trainer(callbacks=[monitored], max_epochs=1).fit(Scripted(set()), datamodule=one_length)


def test_promotion_needs_validation():
    with pytest.raises(
        ValueError, match=r"^a curriculum is promoted by validation, but trainer.limit_val_batches is 0"
    ):
        trainer(limit_val_batches=0).fit(Scripted(set()), datamodule=haystack())
    with pytest.raises(ValueError, match=r"^data.curriculum needs a model that logs val/accuracy, Scripted does not"):
        trainer().fit(Scripted(set(), figure="val/score"), datamodule=haystack())
    trainer(limit_val_batches=0, max_epochs=1).fit(Scripted(set()), datamodule=haystack(curriculum=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curriculum": [8, 8]}, r"^curriculum must be increasing lengths, all below length=32, got \[8, 8\]$"),
        ({"curriculum": [16, 8]}, r"^curriculum must be increasing lengths, all below length=32, got \[16, 8\]$"),
        ({"curriculum": [8, 32]}, r"^curriculum must be increasing lengths, all below length=32, got \[8, 32\]$"),
        ({"curriculum": [64]}, r"^curriculum must be increasing lengths, all below length=32, got \[64\]$"),
        ({"curriculum": [7]}, r"^curriculum \[7\]: length \(for 1 key-value pairs and min_gap 5\) must be at least 8"),
        ({"promote_at": 0.0}, "^promote_at must be above 0 and at most 1, got 0.0$"),
        ({"promote_at": 99}, "^promote_at must be above 0 and at most 1, got 99$"),
        ({"validation_scales": [2]}, "^validation_scales must include 1: a curriculum is promoted by accuracy"),
        ({"validation_window": 0}, "^validation_window must be at least 1, got 0$"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        haystack(**options)


def test_tasks_must_grow():
    for lengths in ([], [20, 10], [10, 10]):
        with pytest.raises(ValueError, match=r"^tasks must be of increasing lengths, at least one, got \["):
            CurriculumDataModule([Haystack(length=length, min_gap=3) for length in lengths])


def test_any_tasks_will_do():
    tasks = [Haystack(length=10, min_gap=3), Haystack(length=20, values=4, min_gap=3)]
    model = Scripted({2})
    data = CurriculumDataModule(tasks, batch_size=2, batches_per_epoch=2, validation_size=2, validation_scales=[1])
    trainer(max_epochs=2).fit(model, datamodule=data)
    assert model.lengths == [10, 10, 20, 20]
