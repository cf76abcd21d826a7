"""What only a GPU can show; `recipes/check_gpu.py` runs these there, beside the parity of its kernels with eager."""

import math
import warnings

import pytest
import torch
from torch import nn

from hf_padam import PAdam, TargetSparsity
from hf_padam.optim.backends import BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where a CUDA device is present"),
]


def test_the_kernel_runs_there():
    assert BACKENDS["triton"].unavailable(torch.device("cuda")) is None


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    ("importance", "p_norm", "target"),
    [("magnitude", 0.8, None), ("fisher", 0.5, None), ("magnitude", 0.8, 0.5), ("fisher", -math.inf, 0.5)],
)
def test_a_step_waits_for_the_device_once_to_aim_and_else_never(backend, importance, p_norm, target):
    generator = torch.Generator("cuda").manual_seed(0)
    params = [nn.Parameter(torch.randn(n, 16, device="cuda", generator=generator)) for n in (256, 257, 3)]
    optimizer = PAdam(params, lr=1e-3, p_norm=p_norm, importance=importance, backend=backend)
    if target:
        TargetSparsity(optimizer, target, 20, start=0.5, end=1.0)  # aims from the eleventh step on
    waits = []
    for _ in range(18):
        for param in params:
            param.grad = torch.randn(param.shape, device="cuda", generator=generator)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert not any(waits[3:10])  # the first ones build kernels and plans
    assert max(waits[10:]) <= (1 if target or importance == "fisher" else 0)  # whose unit is computed now and then
    assert all(param.isfinite().all() for param in params)
