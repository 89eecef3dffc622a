"""The benchmarks' parts that nothing else runs."""

import torch

from benchmarks.step_time import influence_update


def test_influence_update_is_measured() -> None:
    found = influence_update(hidden=4, batch=2, repetitions=1, device=torch.device("cpu"))
    assert found.keys() == {"n", "batch", "update_share_of_sgemm", "product_share_of_sgemm"}
    assert 0 < found["update_share_of_sgemm"]
    assert 0 < found["product_share_of_sgemm"]
