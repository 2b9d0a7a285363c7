"""The C++ kernels under what surrounds them: forked workers, Python threads, copies and pickles of models."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import linvision
from linvision.ops import mlstm, selective_scan, use_backend
from linvision.ops.backends.cpp import library

pytestmark = pytest.mark.skipif(library.missing() is not None, reason="the kernels are not compiled")


def mix(seed: int) -> torch.Tensor:
    """Run both scans, forward and backward, on inputs of their own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2, 70, *shape, generator=generator).requires_grad_()

    q, k, v, i, f = noise(2, 16), noise(2, 16), noise(2, 16), noise(2), noise(2)
    h = mlstm(q, k, v, i, f)
    u, delta, B, C = noise(32), noise(32), noise(4), noise(4)
    y = selective_scan(u, delta, -torch.ones(32, 4), B, C, delta_softplus=True)
    inputs = [q, k, v, i, f, u, delta, B, C]
    gradients = torch.autograd.grad(h.square().sum() + y.square().sum(), inputs)
    return torch.cat([x.detach().flatten() for x in (h, y, *gradients)])


class Mixed(Dataset):
    """A data set whose workers run the ops, as a transform with a model in it would."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return mix(index)


def run_forked_data_loaders() -> None:
    """Compare the ops in forked workers with those here."""
    expected = [mix(seed) for seed in range(4)]  # so that the parent has used its threads before it forks
    loader = DataLoader(Mixed(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for result, truth in zip(loader, expected, strict=True):
        torch.testing.assert_close(result, truth)


def test_forked_data_loaders_run_the_kernels():
    """In a process of its own: torch forbids gradients after a fork where autograd has ever used threads."""
    code = f"from {__name__} import run_forked_data_loaders; run_forked_data_loaders()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=50)
    assert done.returncode == 0, done.stderr


def test_python_threads_run_the_kernels_side_by_side():
    expected = [mix(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(mix, range(8)))
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth)


@pytest.mark.parametrize("name", ["vil2_mini_patch4_32", "vim_mini_patch4_32"])
def test_models_that_ran_can_be_copied_and_pickled(name):
    torch.manual_seed(0)
    model, image = linvision.create_model(name).eval(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode(), use_backend("cpp"):
        expected = model(image)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(image), expected)
