"""Settings of the whole suite: one thread per worker, the same random numbers in every run."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("deterministic", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("deterministic")
pytest.register_assert_rewrite("tests.cells.cell_case")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)
