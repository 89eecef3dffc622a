"""How many processes a run is of."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment


def count_processes(trainer: Any) -> int:
    """How many processes the trainer options ask for: devices times num_nodes."""
    devices = str(trainer.devices)
    if devices in ("auto", "-1"):
        count = torch.cuda.device_count() if trainer.accelerator in ("auto", "gpu", "cuda") else 1
    elif isinstance(trainer.devices, list) or "," in devices:
        count = len([device for device in devices.strip("[]").split(",") if device.strip()])
    elif devices.isdigit():
        count = int(devices)
    else:
        raise ValueError(f"trainer.devices: needs a number, a list of indices, or auto, got {devices or repr(devices)}")
    return count * trainer.num_nodes


def require_all(processes: int) -> None:
    """Refuse to run beside processes of torchrun or srun that would each train alone."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect() and environment().world_size() != processes:
            raise ValueError(
                f"trainer.devices times trainer.num_nodes is {processes}, but {environment().world_size()} processes "
                f"were started ({environment.__name__}): make --trainer.devices their number on a node"
            )
