"""What all tests share: the devices that kernels are tested on."""

import pytest
import torch


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda])],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device with kernels; a test that takes this runs once on each."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
