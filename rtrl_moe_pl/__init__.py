"""Exact online gradients (real-time recurrent learning) for recurrent networks, in Lightning.

Nothing is imported here, so that `import rtrl_moe_pl` costs nothing; use the sub-packages.
"""

__version__ = "0.1.0"
