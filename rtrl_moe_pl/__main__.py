"""``python -m rtrl_moe_pl``: the help is printed before torch and Lightning are imported, which takes seconds."""

from __future__ import annotations

import os
import sys

from rtrl_moe_pl import __version__

HELP = """\
usage: python -m rtrl_moe_pl COMMAND --config FILE [--KEY VALUE ...] [--debug]

Train recurrent networks with exact online gradients.

commands:
  fit        train; logs and checkpoints go to lightning_logs/version_N
  validate   evaluate on the validation sets
  test       evaluate on the test sets
  predict    write predictions; --data.puzzle FILE answers puzzles of a JSON file
  audit      compare the configured gradient with BPTT in float64
  forecast   memory and time of each algorithm on the configured model, and which to use

options:
  --config FILE          YAML configuration; every key can also be given as --KEY VALUE
  --ckpt_path PATH|last  checkpoint to continue from or to evaluate; last is the newest below the output folder
  --print_config         print the whole configuration and stop
  --debug                show the traceback of an error
  --version              print the version
  COMMAND --help         all keys (takes several seconds)
  COMMAND --model.help SequenceModule, --data.help AnBnDataModule: those of a class

examples:
  python -m rtrl_moe_pl fit --config configs/anbn_rtrl.yaml
  python -m rtrl_moe_pl fit --config configs/anbn_rtrl.yaml --model.gradient TBPTT --model.gradient.window 8
  python -m rtrl_moe_pl fit --config configs/recall_rtrl.yaml --ckpt_path last --trainer.max_steps 2000
  python -m rtrl_moe_pl validate --config configs/anbn_rtrl.yaml --ckpt_path last
  python -m rtrl_moe_pl audit --config configs/anbn_rtrl.yaml
  python -m rtrl_moe_pl forecast --config configs/anbn_rtrl.yaml --memory 4
  python -m rtrl_moe_pl predict --config configs/etrm_color_rules.yaml --ckpt_path last --data.puzzle puzzle.json
"""


def run() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's own is none that this process may have
    try:
        from rtrl_moe_pl.cli import main  # late, so that the help is quick
    except KeyboardInterrupt:
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
