"""A module with an embedding table, two optimizers in one, and buffers; what it learns depends on the step alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rtrl_moe_pl.training.averaging import resume_raw
from rtrl_moe_pl.training.optimizers import AdamATan2, CombinedOptimizer, SignSGD
from rtrl_moe_pl.training.schedules import Warmup
from tests.nested import differing


class Tables(LightningModule):
    """An embedding table and a readout, trained in manual optimization; 4 steps an epoch."""

    def __init__(self, seed: int = 1, resumes_raw: bool = True, fails_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(seed)
        self.table = nn.Embedding(6, 3)
        self.readout = nn.Linear(3, 2)
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("steps", torch.tensor(0))
        self.resumes_raw, self.fails_at = resumes_raw, fails_at
        self.validated: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        rows = torch.randint(6, (3,), generator=torch.Generator().manual_seed(self.global_step)).to(self.device)
        outputs = self.readout(self.table(rows))
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward((outputs - rows[:, None]).square().mean())
        optimizer.step()  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr]
        self.running += outputs.detach().mean(0)
        self.steps += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(copied(self))
        if self.fails_at == len(self.validated):
            raise RuntimeError("validation failed")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(copied(self))

    test_step = validation_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.resumes_raw:
            resume_raw(checkpoint, self.trainer)

    def configure_optimizers(self) -> Any:
        optimizer = CombinedOptimizer(
            [AdamATan2(self.readout.parameters(), lr=0.05), SignSGD(self.table.parameters(), lr=0.1)]
        )
        return [optimizer], [Warmup(optimizer, 2, total_steps=9, final_fraction=0.1)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(4))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(1))  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


def trainer(folder: Path, steps: int = 6, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": 2,
    }
    return Trainer(max_steps=steps, **{**defaults, **options})


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(one: Any, other: Any) -> bool:
    """Whether nested dicts, lists and tensors agree bit for bit."""
    return not differing(one, other)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # tensors, numbers, strings, lists and dicts only
