"""The DataModules: what they deliver, refuse and promise before anything runs."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from rtrl_moe_pl.data import (
    AnBnDataModule,
    Batch,
    DelayedCopyDataModule,
    DelayedRecallDataModule,
    HaystackDataModule,
    SequenceDataModule,
    Stream,
)
from rtrl_moe_pl.tasks import AnBn, DelayedRecall


def batches(module: SequenceDataModule, loader) -> list[Batch]:
    return [module.on_after_batch_transfer(request, 0) for request in loader]


def test_sizes_are_known_after_init():
    module = AnBnDataModule()
    assert (module.input_size, module.output_size, module.layout) == (3, 2, "stream")
    assert module.validation_names == ["", "2x", "4x"]
    assert AnBnDataModule(task_layout="predecessor").input_size == 4
    recall = DelayedRecallDataModule(values=5, noise_tokens=2, layout="sequences", validation_scales=[1, 3])
    assert (recall.input_size, recall.output_size, recall.layout) == (8, 5, "sequences")
    assert recall.validation_names == ["", "3x"]
    haystack = HaystackDataModule(values=5, needles=2, distractors=3)
    assert (haystack.input_size, haystack.output_size) == (4 + 5 + 2 + 3, 5)
    copy = DelayedCopyDataModule(symbols=7)
    assert (copy.input_size, copy.output_size) == (7, 7)


@pytest.mark.parametrize(("layout", "steps"), [("stream", 10), ("sequences", 33)])
def test_training_batches(layout, steps: int):
    module = AnBnDataModule(seed=4, batch_size=6, layout=layout, steps_per_batch=10, batches_per_epoch=7)
    loader = module.train_dataloader()
    assert len(loader) == 7
    made = batches(module, loader)
    assert len(made) == 7
    stream = Stream(AnBn(), 4, 6, 10 if layout == "stream" else None)
    cursor = stream.first()
    for batch in made:
        expected = stream.batch(cursor)
        assert batch.inputs.shape == (6, steps, 3)
        assert batch.inputs.dtype == batch.targets[1].dtype == torch.float32
        assert torch.equal(batch.inputs, torch.nn.functional.one_hot(expected.inputs, 3).float())
        for a, b in zip([*batch.targets, batch.starts], [*expected.targets, expected.starts], strict=True):
            assert torch.equal(a, b)
        cursor = stream.advance(cursor)


def test_ids():
    module = AnBnDataModule(encoding="ids", batch_size=2)
    batch = batches(module, module.train_dataloader())[0]
    assert batch.inputs.dtype == torch.int64
    assert batch.inputs.shape == (2, 64)


@pytest.mark.parametrize(
    ("module", "lengths"),
    [
        (AnBnDataModule(n_max=16, validation_size=500), [(5, 33), (35, 65), (67, 129)]),
        (AnBnDataModule(n_max=5, task_layout="predecessor", validation_size=500), [(11, 11), (21, 21), (41, 41)]),
        (DelayedRecallDataModule(min_gap=10, max_gap=20, validation_size=500), [(12, 22), (23, 42), (43, 82)]),
        (HaystackDataModule(length=20, min_gap=9, validation_size=500), [(20, 20), (40, 40), (80, 80)]),
    ],
    ids=["anbn", "predecessor", "recall", "haystack"],
)
@pytest.mark.parametrize("split", ["val", "test"])
def test_validation_sets_are_longer_by_their_factor(module: SequenceDataModule, lengths, split: str):
    loaders = module.val_dataloader() if split == "val" else module.test_dataloader()
    for loader, (shortest, longest) in zip(loaders, lengths, strict=True):
        made = batches(module, loader)
        found = torch.cat([batch.targets[1].argmax(1) + 1 for batch in made])  # asked at the last step
        assert len(found) == 500
        assert (int(found.min()), int(found.max())) == (shortest, longest)
        assert all(batch.starts[:, 0].all() and batch.starts.sum() == len(batch.starts) for batch in made)


def content(module: SequenceDataModule, loaders) -> list[bytes]:
    """The inputs of every batch of loaders of this module."""
    return [batch.inputs.numpy().tobytes() for loader in loaders for batch in batches(module, loader)]


def test_validation_and_test_are_fixed_and_apart():
    def make(seed: int = 0) -> SequenceDataModule:
        options = {"batch_size": 1024, "batches_per_epoch": 1, "validation_batch_size": 1024}
        return DelayedRecallDataModule(seed=seed, layout="sequences", **options)

    module, again, other_seed = make(), make(), make(seed=1)
    validation = content(module, module.val_dataloader())
    batches(module, module.train_dataloader())
    assert content(module, module.val_dataloader()) == validation  # training moves nothing
    assert content(again, again.val_dataloader()) == validation
    sets = validation + content(module, module.test_dataloader()) + content(module, [module.train_dataloader()])
    assert len(set(sets)) == 7
    assert not set(content(other_seed, other_seed.val_dataloader())) & set(sets)
    train = batches(again, again.train_dataloader())[0].inputs
    rows = {row.numpy().tobytes() for row in train}
    for loader in [module.val_dataloader()[0], module.test_dataloader()[0]]:
        other = batches(module, loader)[0].inputs
        # 4 values * 4^20 noises: drawn apart, two equal rows are as good as impossible.
        assert not rows & {row.numpy().tobytes() for row in other}


def test_prediction_takes_the_first_test_set():
    module = AnBnDataModule(validation_size=20)
    assert content(module, [module.predict_dataloader()]) == content(module, module.test_dataloader()[:1])


def test_ranks_draw_their_own_lanes():
    modules = [AnBnDataModule(batch_size=3, validation_size=10, validation_batch_size=2) for _ in range(3)]
    for rank in range(2):
        trainer = SimpleNamespace(global_rank=rank, world_size=2, lightning_module=None)
        modules[rank].trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
    together = modules[2].train_dataloader()
    parts = [module.train_dataloader() for module in modules[:2]]
    assert [part.stream.lanes for part in parts] == [6, 6]
    firsts = [next(iter(part)).cursor.index.tolist() for part in parts]
    assert firsts == [[0, 1, 2], [3, 4, 5]]
    assert next(iter(together)).cursor.index.tolist() == [0, 1, 2]
    shares = [[i for r in m.val_dataloader()[1] for i in r.cursor.index.tolist()] for m in modules[:2]]
    assert shares == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, -1]]


def test_without_a_trainer_each_loader_starts_afresh():
    module = AnBnDataModule(batches_per_epoch=3)
    assert content(module, [module.train_dataloader()]) == content(module, [module.train_dataloader()])


class Recorder(LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[Batch] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight * batch.targets[1].sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)]
)
def test_inputs_have_the_dtype_of_the_model(precision, dtype: torch.dtype):
    trainer = Trainer(
        max_steps=1,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=1,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=AnBnDataModule(batch_size=2, validation_size=3, validation_batch_size=2))
    assert len(recorder.seen) == 3 + 1  # three sanity batches, one training batch
    for batch in recorder.seen:
        assert batch.inputs.dtype == batch.targets[1].dtype == dtype
        assert batch.targets[0].dtype == torch.int64
        assert batch.starts.dtype == torch.bool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps_per_batch": -1}, "steps_per_batch must be at least 1, got -1"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be at least 1, got 0"),
        ({"validation_size": 0}, "validation_size must be at least 1, got 0"),
        ({"validation_batch_size": 0}, "validation_batch_size must be at least 1, got 0"),
        ({"validation_scales": [1, 0]}, "validation_scales must be at least 1, got 0"),
        ({"validation_scales": []}, "validation_scales needs at least one factor, got none"),
        ({"layout": "packed"}, "layout must be one of 'stream', 'sequences', got 'packed'"),
        ({"encoding": "two_hot"}, "encoding must be one of 'one_hot', 'ids', got 'two_hot'"),
        ({"n_min": 9, "n_max": 8}, r"n_max \(n_min is 9\) must be at least 9, got 8"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AnBnDataModule(**options)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="batchsize"):
        AnBnDataModule(batchsize=3)


def test_any_task_will_do():
    module = SequenceDataModule(DelayedRecall(values=2, min_gap=1, max_gap=3), batch_size=2)
    assert batches(module, module.train_dataloader())[0].inputs.shape == (2, 64, 7)
