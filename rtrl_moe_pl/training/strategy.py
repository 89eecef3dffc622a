"""Several processes without a reducer: gradients have one path, the collective in `update`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rtrl_moe_pl.training.checkpoints import PER_RANK, shard_of

PARENT = "RTRL_MOE_PL_PARENT"  # environment variable: number of the process that starts the others


def require_same_processes(saved: dict[str, Any], running: int) -> None:
    """Refuse to take up lanes, or sums of gradients, that were spread over another number of processes."""
    if saved["world_size"] != running and (saved["carry"] is not None or saved["sums"]["batches"]):
        raise ValueError(
            f"--ckpt_path: the checkpoint was written by {saved['world_size']} processes, but {running} are running: "
            f"set trainer.devices (times trainer.num_nodes) to {saved['world_size']}, whose lanes it continues"
        )


def require_same_checkpoint(batches: int, device: torch.device) -> None:
    """Refuse to go on if processes that looked for the newest checkpoint themselves found several: one collective."""
    ends = torch.tensor([batches, -batches], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    last, first = int(ends[0]), -int(ends[1])
    if first != last:
        raise ValueError(
            f"--ckpt_path: one process found a checkpoint of batch {first}, another of {last}: name the file"
        )


def require_broadcast(strategy: object, processes: int) -> None:
    """Refuse strategies, by object or name, that do not keep what is each process's own."""
    if processes > 1 and strategy != "broadcast" and not isinstance(strategy, BroadcastStrategy):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(
            f"trainer.strategy={name} is not supported with {processes} processes: it averages no hand-written "
            "gradients, and keeps the carry of one process alone; leave it out, or use broadcast"
        )


def end_with_parent(stop: threading.Event, every: float = 2.0) -> None:
    """End this process, one that the parent started, when the parent has ended without it, unless ``stop`` is set.

    The parent watches its children (Lightning's launcher, torchrun); without it a collective of NCCL would wait for
    its timeout. An error of a collective has time to be printed first.
    """
    # A process that reads its parent's number late may have lost the parent already.
    told = None if "TORCHELASTIC_RUN_ID" in os.environ else os.environ.get(PARENT)
    parent = os.getppid() if told is None else int(told)

    def watch() -> None:
        while os.getppid() == parent:
            if stop.wait(every):
                return
        if not stop.wait(every):
            print("error: the process that started this one has ended", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def end_on_sigterm(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM that ends this process; the others end at their next collective, as if it were lost."""
    raise SIGTERMException


def leave_group() -> None:
    """Close the connections to the other processes; none where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


class BroadcastStrategy(DDPStrategy):
    """Data parallelism for modules that write ``p.grad`` themselves (``strategy: broadcast``).

    DistributedDataParallel reduces only gradients that autograd accumulates; hand-written ones would differ between
    ranks in silence. This strategy broadcasts the weights of rank 0 once and leaves gradients to `update`.
    Checkpoints are written by rank 0; the carry of rank r > 0 goes to ``<checkpoint>.rank<r>`` beside it.
    """

    _finished: threading.Event

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:  # this is the process that starts the others
            os.environ[PARENT] = str(os.getpid())
        super()._configure_launcher()

    def setup_environment(self) -> None:
        self._finished = threading.Event()
        if self.local_rank > 0:
            end_with_parent(self._finished)
        super().setup_environment()
        # Threads of gloo that outlive the interpreter abort the process now and then, after all is done (status 134).
        atexit.unregister(leave_group)
        atexit.register(leave_group)

    def teardown(self) -> None:
        self._finished.set()
        if os.environ.get(PARENT) == str(os.getpid()):
            del os.environ[PARENT]
        super().teardown()

    def barrier(self, name: str | None = None) -> None:
        # The first thing after Lightning put up a handler of SIGTERM that makes a collective, wherever the process is,
        # and waits for ever. It takes this one away with its own.
        if name == "run-stage" and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, end_on_sigterm)
        super().barrier(name)

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.detach(), src=0)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if not self.is_global_zero and PER_RANK in checkpoint:
            self.checkpoint_io.save_checkpoint({PER_RANK: checkpoint[PER_RANK]}, shard_of(filepath, self.global_rank))

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        fitting = self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if fitting and PER_RANK in checkpoint:
            require_same_checkpoint(checkpoint[PER_RANK]["batches"], self.root_device)
            require_same_processes(checkpoint[PER_RANK], self.world_size)
            if not self.is_global_zero and checkpoint[PER_RANK]["world_size"] == self.world_size:
                shard = shard_of(checkpoint_path, self.global_rank)
                if not shard.is_file():
                    raise FileNotFoundError(
                        f"--ckpt_path: {shard} is missing: it holds the carry of rank {self.global_rank}"
                    )
                checkpoint[PER_RANK] = torch.load(shard, map_location="cpu", weights_only=True)[PER_RANK]
        return checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if not self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(shard_of(filepath, self.global_rank))


StrategyRegistry.register("broadcast", BroadcastStrategy, description=BroadcastStrategy.__doc__ or "")
