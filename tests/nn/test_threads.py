"""Several threads of Python at once, and signals during a call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastseq import nn


@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_give_the_bits_of_one(threads):
    torch.set_num_threads(threads)
    layers = [nn.LSTM(16, 40, 2, bidirectional=True), nn.GRU(16, 64), nn.LSTMCell(16, 32)]

    def train(index: int) -> list[torch.Tensor]:
        module = layers[index % 3]
        generator = torch.Generator().manual_seed(index)
        shape = (7, 16) if index % 3 == 2 else (3 + index % 5, 6, 16)
        x = torch.randn(shape, generator=generator)
        return torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))

    expected = [train(i) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(train, range(24)))
    for got, want in zip(found, expected, strict=True):
        assert all(map(torch.equal, got, want))


def test_one_module_is_read_in_threads_while_it_trains_in_another():
    """What the readers see of a step under way is the program's affair; none may crash."""
    module = nn.LSTM(8, 16)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    with ThreadPoolExecutor(3) as pool:

        def read(_) -> bool:
            with torch.no_grad():
                return all(bool(module(torch.ones(5, 4, 8))[0].isfinite().all()) for _ in range(50))

        readers = [pool.submit(read, i) for i in range(3)]
        for _ in range(50):
            module(torch.ones(5, 4, 8))[0].square().mean().backward()
            optimiser.step()
        assert all(reader.result(60) for reader in readers)


@pytest.mark.parametrize("grad", [False, True])
def test_interrupted_in_a_long_call(grad):
    """KeyboardInterrupt comes once the call is over, and the next call is as good as ever."""
    program = f"""
        import signal, threading, time, os
        import torch
        from fastseq import nn
        # Python leaves it as it is where the shell has started the tests in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(2)
        layer, small = nn.LSTM(64, 128), torch.randn(5, 3, 64)
        expected, long = layer(small)[0], torch.randn(400, 16, 64)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        try:
            with torch.set_grad_enabled({grad}):
                while time.monotonic() - began < 60:
                    y = layer(long)[0]
                    if {grad}:
                        y.sum().backward()
            print("never")
        except KeyboardInterrupt:
            print("interrupted" if time.monotonic() - began < 30 else "late")
        layer(long)[0].sum().backward()
        print(torch.equal(layer(small)[0], expected))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["interrupted", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_between_calls():
    """The child of a process whose threads have run a kernel runs one itself (where torch's own
    operators wait forever)."""
    torch.set_num_threads(2)
    module, x = nn.GRU(32, 64), torch.randn(20, 16, 32)
    expected = module(x)[0].detach()
    torch.relu(torch.randn(1 << 20))
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        same = torch.equal(module(x)[0], expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
