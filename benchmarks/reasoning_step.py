"""One training step of recursive models: CPU seconds (milliseconds on a GPU) and peak memory.

    OMP_NUM_THREADS=1 python -m benchmarks.reasoning_step           # every case in a process of its own
    python -m benchmarks.reasoning_step --device cuda

Width 128, 2 layers, 4 heads, grids of 9 x 9 cells, batches of 32, prefix 16, 3 x 6 cycles, AdamW. A step renews lanes
that have halted, encodes, thinks for one supervision step, and updates. Lanes are spread evenly over 16 steps of
thinking, so that two of 32 have just begun. ETRM has three demonstrations a puzzle. *of sgemm*: floating-point
operations of the model's matrix products, attention's left out, over what a large matrix product does in that time, in
the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.common import interleaved, sgemm_peak, write
from rtrl_moe_pl.reasoning import TRM, Carry, Encoder, PairTokenEncoder, PuzzleEmbedding, ReasoningLoss, supervise
from rtrl_moe_pl.reasoning.encoders import HybridVariationalEncoder, LPNEncoder, StandardEncoder
from rtrl_moe_pl.tasks.puzzles import RulePuzzles

BATCH, STEPS, PREFIX = 32, 16, 16
PUZZLES = RulePuzzles(size=9, colors=9, demos=3)
# name: encoder, its options, mode, options of the decoder
CASES: dict[str, tuple[type[Encoder], dict[str, Any], Any, dict[str, Any]]] = {
    "TRM-Att": (PuzzleEmbedding, {}, "re_encode", {}),
    "TRM-Att, 3 x 4 cycles": (PuzzleEmbedding, {}, "re_encode", {"l_cycles": 4}),
    "TRM-MLP": (PuzzleEmbedding, {}, "re_encode", {"mixer": "mlp"}),
    "ETRM pair tokens, re_encode": (PairTokenEncoder, {}, "re_encode", {}),
    "ETRM pair tokens, fixed_time": (PairTokenEncoder, {}, "fixed_time", {}),
    "ETRM pair tokens, cached": (PairTokenEncoder, {}, "cached", {}),
    "ETRM standard, re_encode": (StandardEncoder, {}, "re_encode", {}),
    "ETRM standard, cached": (StandardEncoder, {}, "cached", {}),
    "ETRM hybrid variational, re_encode": (HybridVariationalEncoder, {}, "re_encode", {}),
    "ETRM LPN variational, re_encode": (LPNEncoder, {"variational": True}, "re_encode", {}),
}
ENCODE_ALL, ENCODE_FRESH = "encode 32 lanes (standard)", "encode the 2 that have begun (standard)"


def lanes(decoder: TRM, device: torch.device) -> Carry:
    """Lanes whose puzzles have had 0 to 15 steps; those with none halted before, and hold the next."""
    index = torch.arange(BATCH, device=device)
    carry = Carry.first(decoder, index, PUZZLES.draw("train", 0, index))
    return replace(carry, steps=index % STEPS)


def prepare(name: str, device: torch.device) -> tuple[Callable[[], None], dict[str, Any]]:
    """A training step, and what is known of the model."""
    kind, encoder_options, mode, options = CASES[name]
    torch.manual_seed(0)
    shape = PUZZLES.shape._replace(vocabulary=12)
    decoder = TRM(shape, width=128, heads=4, layers=2, prefix=PREFIX, **options).to(device)
    encoder, loss = kind(shape, 128, PREFIX, **encoder_options).to(device), ReasoningLoss()
    parameters = [*decoder.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    carry = lanes(decoder, device)
    if mode == "cached":
        context = encoder(carry.puzzles).context.detach()
        carry = replace(carry, context=context)

    def step() -> None:
        nonlocal carry
        carry = carry.renew(decoder, BATCH, lambda index: PUZZLES.draw("train", 0, index))
        made = supervise(decoder, encoder, carry, mode, 0)
        total = loss(made.answer, made.carry.puzzles.labels).total(0.5)
        if made.encoding.kl is not None:
            total = total + 1e-4 * made.encoding.kl.sum()
        grads = torch.autograd.grad(total / BATCH, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        carry = replace(made.carry, halted=made.carry.steps >= STEPS)

    return step, {"parameters": sum(p.numel() for p in parameters)}


def measure(name: str, device: torch.device, repetitions: int) -> dict[str, Any]:
    """Time and memory of one case, in this process."""
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if name in (ENCODE_ALL, ENCODE_FRESH):
        return {"case": name, **encoding(name, device, repetitions)}
    step, facts = prepare(name, device)
    step()
    times = timed(step, device, repetitions)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # before what is measured below
    if device.type == "cuda":
        peak, started = torch.cuda.max_memory_allocated(device) / 2**20, 0.0
    with FlopCounterMode(display=False) as counter:
        step()
    share = counter.get_total_flops() / statistics.median(times) / sgemm_peak(device)
    return {
        "case": name,
        **facts,
        **spread(times),
        "gflop": round(counter.get_total_flops() / 1e9, 1),
        "of_sgemm": round(share, 3),
        "peak_MiB": round(peak),
        "of_training_MiB": round(peak - started),
    }


def encoding(name: str, device: torch.device, repetitions: int) -> dict[str, Any]:
    """An encoder forward and backward, of all lanes or of those that have begun."""
    encoder = StandardEncoder(PUZZLES.shape, 128, PREFIX).to(device)
    puzzles = PUZZLES.draw("train", 0, torch.arange(BATCH, device=device))
    puzzles = puzzles if name == ENCODE_ALL else puzzles.rows(torch.arange(BATCH, device=device) % STEPS == 0)

    def run() -> None:
        encoder(puzzles).context.sum().backward()

    run()
    return spread(timed(run, device, repetitions))


def timed(run: Callable[[], None], device: torch.device, repetitions: int) -> list[float]:
    """CPU seconds of the process on a CPU, wall seconds on a GPU, after one more call."""
    if device.type == "cuda":
        return interleaved([run], 4 * repetitions, device, warm_up=3)[0]
    times = []
    for _ in range(repetitions):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return times


def spread(times: list[float]) -> dict[str, float]:
    return {"seconds": round(statistics.median(times), 4), "least": round(min(times), 4), "most": round(max(times), 4)}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| one training step | parameters | CPU s (least to most) | GFLOP | of sgemm | peak of the process, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        parameters = flops = share = peak = ""
        if "gflop" in row:
            parameters, peak = f"{row['parameters']:,}", str(row["peak_MiB"])
            flops, share = f"{row['gflop']:.0f}", f"{row['of_sgemm']:.0%}"
        times = f"{row['seconds']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        lines.append(f"| {row['case']} | {parameters} | {times} | {flops} | {share} | {peak} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--case", help="one case, printed as JSON and not written")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.case:
        print(json.dumps(measure(arguments.case, device, arguments.repetitions)))
        return
    rows = []
    for name in tqdm([*CASES, ENCODE_ALL, ENCODE_FRESH]):
        command = [sys.executable, "-m", "benchmarks.reasoning_step", "--case", name, "--device", str(device)]
        command += ["--repetitions", str(arguments.repetitions)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        tqdm.write(f"{name}: {rows[-1]['seconds']:.3f} s")
    write(f"reasoning_step_cpu_{torch.get_num_threads()}" if device.type == "cpu" else "reasoning_step", device, rows)


if __name__ == "__main__":
    main()
