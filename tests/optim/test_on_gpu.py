"""What only a GPU can show; `recipes/check_gpu.py` runs these there, beside the parity of its kernels with eager."""

import math

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
def test_between_aims_a_step_never_waits_for_the_device(backend, importance, p_norm, target):
    generator = torch.Generator("cuda").manual_seed(0)
    params = [nn.Parameter(torch.randn(n, 16, device="cuda", generator=generator)) for n in (256, 257, 3)]
    optimizer = PAdam(params, lr=1e-3, p_norm=p_norm, importance=importance, backend=backend)
    if target:
        TargetSparsity(optimizer, target, 1000)  # aims from step 200 on
    for step in range(8):
        for param in params:
            param.grad = torch.randn(param.shape, device="cuda", generator=generator)
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(param.isfinite().all() for param in params)
