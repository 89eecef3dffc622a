"""How many processes a run is of, and what they have to agree on before they can talk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.training.checkpoints import newest_readable
from rtrl_moe_pl.training.strategy import PARENT, require_broadcast

PER_CORE = 8  # processes at most; more would fill the memory before the first of them says what is wrong
STRATEGIES = "auto", "broadcast", "single_device", "ddp"  # by name; the last two of one process
RANKS = "RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"  # environment variables that Lightning reads
LAST = "RTRL_MOE_PL_LAST"  # environment variable: the checkpoint that the first process took for the last


def resolve_last(root: Path, resumable: bool) -> str:
    """The checkpoint that ``--ckpt_path last`` means: the same for a process and those that it starts.

    Each by itself could find another, while a second run writes into the same folder. Processes that torchrun or srun
    started look by themselves.
    """
    if rank_zero_only.rank != 0 and LAST in os.environ:
        return os.environ[LAST]
    found = os.environ[LAST] = str(newest_readable(root, resumable))
    if rank_zero_only.rank == 0:
        print(f"--ckpt_path last: {found}")
    return found


def count_processes(trainer: Any) -> int:
    """How many processes the trainer options ask for: devices times num_nodes."""
    devices = str(trainer.devices)
    cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.accelerator.is_available())
    listed = [device for device in devices.strip("[]").split(",") if device.strip()] if set(devices) & set("[,") else []
    if devices == "auto" or (devices == "-1" and not cpu):
        count = max(1, torch.cuda.device_count()) if trainer.accelerator in ("auto", "gpu", "cuda") else 1
    elif listed and not cpu:
        count = len(listed)
    elif devices.isdecimal() and int(devices):
        count, cores = int(devices), os.cpu_count() or 1
        if count > PER_CORE * cores:
            raise ValueError(f"trainer.devices={count} is more than {PER_CORE} processes for each of {cores} cores")
    else:
        needs = "on CPUs needs a number" if cpu else "needs a list of indices, a number"
        raise ValueError(f"trainer.devices: {needs} above 0, or auto, got {devices or repr(devices)}")
    return count * trainer.num_nodes


def strategy_of(trainer: Any) -> Any:
    """The strategy that trains right with as many processes: the given one, if it does."""
    processes = count_processes(trainer)
    require_all(processes)
    if processes > 1 and trainer.strategy == "auto":
        return "broadcast"
    require_strategy(trainer.strategy, processes)  # before any process is started
    return trainer.strategy


def require_strategy(strategy: object, processes: int) -> None:
    """Refuse strategies, by object or name, that are not known to train right with so many processes."""
    require_broadcast(strategy, processes)
    if isinstance(strategy, str):
        one_of(STRATEGIES, "trainer.strategy", strategy)


def _launcher() -> type[TorchElasticEnvironment] | type[SLURMEnvironment] | None:
    """What started this process beside others; torchrun first, which may be used within a job of SLURM."""
    return next((found for found in (TorchElasticEnvironment, SLURMEnvironment) if found.detect()), None)


def require_all(processes: int) -> None:
    """Refuse to run beside processes of torchrun or srun that would each train alone, or as one of none.

    The rank that the environment gives decides who writes; left there from elsewhere, nobody would.
    """
    launcher = _launcher()
    if launcher is not None:
        if launcher().world_size() != processes:
            raise ValueError(
                f"trainer.devices times trainer.num_nodes is {processes}, but {launcher().world_size()} processes were "
                f"started ({launcher.__name__}): make --trainer.devices their number on a node"
            )
        return
    started = PARENT in os.environ or "MASTER_PORT" in os.environ  # by this package; one by one, by a user
    first = {"RANK", "LOCAL_RANK"} <= os.environ.keys() and os.environ.get("WORLD_SIZE", "1") != "1"
    if (rank_zero_only.rank or first) if processes == 1 else "LOCAL_RANK" in os.environ and not started:
        given = " and ".join(f"{name}={os.environ[name]}" for name in RANKS if name in os.environ)
        raise ValueError(
            f"the environment has {given}, as of one process of several, but nothing has started the others: unset "
            "what is left there from elsewhere, or start all of them with torchrun or srun"
        )


def without_requeueing(trainer: Any) -> list[Any]:
    """Plugins of a Trainer, on SLURM without its requeueing, which saves in the middle of an update, and whose
    checkpoint the next fit of a job in that folder would go on from unasked."""
    plugins = trainer.plugins
    given = [] if plugins is None else list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    chosen = [*given, getattr(trainer.strategy, "cluster_environment", None)]
    if _launcher() is SLURMEnvironment and not any(isinstance(found, ClusterEnvironment) for found in chosen):
        given.append(SLURMEnvironment(auto_requeue=False))
    return given


def require_no_restart() -> None:
    """Refuse to train from scratch where torchrun starts processes again by the same command."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count != "0":
        raise ValueError(
            f"torchrun has started this command again (TORCHELASTIC_RESTART_COUNT={count}), and without --ckpt_path it "
            "would train from scratch: leave out --max_restarts, and go on with --ckpt_path last"
        )
