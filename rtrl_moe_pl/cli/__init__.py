"""The command line."""

from rtrl_moe_pl.cli.command_line import CommandLine, main

__all__ = ["CommandLine", "main"]
