"""A few hundred random calls of the ops; ``python -m tests.ops.fuzz`` runs as many as one likes."""

import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress

import pytest
import torch

from linvision import ops
from tests.ops import fuzz
from tests.ops.kernels import needs_kernels
from tests.ops.random_calls import BACKWARD, FORWARD, Draw


def test_random_calls_compute_or_are_refused():
    command = [sys.executable, "-m", "tests.ops.fuzz", "--calls", "200"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_call_that_dies_or_hangs_is_named(monkeypatch):
    def run(call):
        if call.op == "mlp":
            os.kill(os.getpid(), signal.SIGKILL)
        if call.op == "linear":
            fuzz.time.sleep(10)

    monkeypatch.setattr(fuzz, "fault", run)
    monkeypatch.setattr(fuzz, "LIMIT", 0.3)
    texts = list(fuzz.batches(0, 20, "public"))
    warnings.simplefilter("ignore")  # torch's, of quantised tensors
    ops_drawn = [fuzz.draw_call(seed, "public").op for seed in range(20)]
    assert sum("ended with -9: mlp" in text for text in texts) == ops_drawn.count("mlp") > 0
    assert sum("not done after" in text for text in texts) == ops_drawn.count("linear") > 0


WORDS = "must be a tensor|Expected a value of type|layer norm without a weight"


@pytest.mark.parametrize("make", [*FORWARD, *BACKWARD], ids=lambda make: make.__name__)
def test_every_registered_operator_is_drawn_and_refuses_none_for_each_tensor(make):
    operator, arguments = getattr(torch.ops.linvision, make.__name__), None
    for seed in range(100):
        with suppress(ValueError):  # no tokens, a kernel of even sides
            drawn, _ = make(Draw(seed), torch.float32)
            operator(*drawn)
            arguments = drawn
            break
    assert arguments is not None
    for place, argument in enumerate(operator.default._schema.arguments):
        if str(argument.type) == "Tensor":
            with pytest.raises((TypeError, ValueError, RuntimeError), match=WORDS):
                operator(*arguments[:place], None, *arguments[place + 1 :])


def test_no_operator_is_left_out():
    drawn = {make.__name__ for make in (*FORWARD, *BACKWARD)}
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("linvision::")
    }
    assert {name.split(".")[0] for name in registered} == drawn


@needs_kernels
def test_a_tensor_whose_memory_was_freed_is_refused():
    inputs = [torch.randn(1, 3, 2, 4) for _ in range(3)] + [torch.randn(1, 3, 2) for _ in range(2)]
    inputs[1].untyped_storage().resize_(0)
    with ops.use_backend("cpp"), pytest.raises(ValueError, match="has no memory"):
        ops.mlstm(*inputs)
