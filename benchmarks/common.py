"""Timing, machine facts and result files, for all benchmarks."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    model = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    facts = {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue drained on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def interleaved(
    runs: Sequence[Callable[[], object]], repetitions: int, device: torch.device, warm_up: int = 1
) -> list[list[float]]:
    """Seconds of every repetition of every run, taken in turn: what slows the machine for a while slows all."""
    for _ in range(warm_up):
        for run in runs:
            run()
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repetitions):
        for run, times in zip(runs, taken, strict=True):
            times.append(seconds(run, device))
    return taken


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over repetitions of the ratio of neighbours in time."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def sgemm_peak(device: torch.device, size: int = 1024, repetitions: int = 9) -> float:
    """Floating-point operations a second of a large single-precision matrix product."""
    a, b = torch.randn(2, size, size, device=device)
    out = torch.empty(size, size, device=device)
    times = interleaved([lambda: torch.mm(a, b, out=out)], repetitions, device)[0]
    return 2 * size**3 / statistics.median(times)


@contextmanager
def ended_by_interrupt(*pools: Executor) -> Iterator[None]:
    """Ctrl-C within it ends, at once and quietly, the program, jobs of pools, and (on Linux) all processes it started.

    A pool alone would end its jobs first. Start jobs ``without_interrupts``.
    """
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would print a traceback
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for listed in Path("/proc/self/task").glob("*/children"):
            for child in listed.read_text().split():
                os.kill(int(child), signal.SIGTERM)  # which the tracker of a pool's semaphores survives, as it must
        raise SystemExit(130) from None


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes and threads that are started within it never see Ctrl-C: each would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def results_file(name: str, device: torch.device) -> Path:
    """benchmarks/results/NAME.json, or NAME_cuda.json for a GPU."""
    return RESULTS / f"{name}{'' if device.type == 'cpu' else '_' + device.type}.json"


def write(name: str, device: torch.device, results: Any) -> Path:
    """Write results with the machine's facts to their file."""
    RESULTS.mkdir(exist_ok=True)
    path = results_file(name, device)
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1) + "\n")
    whole.replace(path)  # an interrupt leaves the old results, or the new ones
    return path


def read(name: str, device: torch.device) -> Any:
    """Results written before, on the same machine.

    Raises:
        SystemExit: if there are none, or they are of another machine.
    """
    path = results_file(name, device)
    if not path.exists():
        raise SystemExit(f"error: there is no {path} to put points into: run the whole grid first")
    held = json.loads(path.read_text())
    if held["machine"] != machine(device):
        raise SystemExit(f"error: {path} is of another machine ({held['machine']}): run the whole grid here first")
    return held["results"]
