"""Packed weights kept from call to call are never those of before: csrc/cpu/support/kept.h.

Every answer is compared, bit for bit, with that of copies of the weights at other addresses, from
which nothing can have been kept.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.nn.utils import parametrize

from fastseq import nn

# Few tokens, weights of more than 128 KiB in all dtypes.
T, B, SIZE = 6, 2, 96


def fresh(module):
    """The same weights where none have been."""
    twin = type(module)(SIZE, SIZE, bidirectional=module.bidirectional, dtype=x_of(module).dtype)
    with torch.no_grad():
        for name, own in twin.named_parameters():
            own.copy_(getattr(module, name))
    FRESH.append(twin)
    return twin


FRESH: list = []  # nothing is freed, so that no address comes again


def x_of(module):
    weight = module._flat_weights[0]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(T, B, SIZE, generator=generator).to(weight.dtype)


def assert_current(module):
    x = x_of(module)
    with torch.no_grad():
        for _ in range(2):  # kept by the first, found by the second
            found = module(x)[0]
        expected = fresh(module)(x)[0]
    assert torch.equal(found, expected)
    assert found.abs().max() > 0


def in_place(m):
    with torch.no_grad():
        m.weight_hh_l0.mul_(1.5)


def one_element(m):
    m.weight_hh_l0.data[-1, -1] += 1


def signs(m):
    m.weight_ih_l0.data.neg_()


def swapped_rows(m):
    m.weight_hh_l0.data[[3, 5]] = m.weight_hh_l0.data[[5, 3]]


def by_numpy(m):
    m.weight_ih_l0.detach().numpy()[7, 11] = 3


def bias(m):
    m.bias_hh_l0.data[0] = 5


def data_anew(m):
    m.weight_hh_l0.data = torch.randn_like(m.weight_hh_l0)


def load(m):
    m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()})


def step(m):
    m(x_of(m))[0].sum().backward()
    torch.optim.SGD(m.parameters(), 0.1).step()


def there_and_back(m):
    m.double()
    m.float()
    m.weight_hh_l0.data.add_(0.01)


CHANGES = [in_place, one_element, signs, swapped_rows, by_numpy, bias, data_anew, load, step]
CHANGES += [there_and_back]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_change_is_seen(cls, bidirectional, change):
    module = cls(SIZE, SIZE, bidirectional=bidirectional)
    assert_current(module)
    for _ in range(2):
        change(module)
        assert_current(module)


@pytest.mark.parametrize("apart", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256])
def test_signs_changed_in_pairs(apart):
    """A sign is the one bit that a product does not spread: two of them must not cancel."""
    module = nn.LSTM(SIZE, SIZE)
    assert_current(module)
    for first in range(6):
        module.weight_ih_l0.data.view(-1)[[first, first + apart]] *= -1
        assert_current(module)
        module.weight_hh_l0.data.view(-1)[[first, first + apart, first + 2 * apart]] *= -1
        assert_current(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    module = nn.LSTM(SIZE, SIZE, dtype=dtype)
    assert_current(module)
    one_element(module)
    assert_current(module)


def test_deepcopy_and_tied_weights():
    module = nn.LSTM(SIZE, SIZE)
    assert_current(module)
    other, tied = copy.deepcopy(module), nn.LSTM(SIZE, SIZE)
    for name in dict(module.named_parameters()):
        setattr(tied, name, getattr(module, name))
    signs(module)
    for one in (module, other, tied):
        assert_current(one)


def test_two_layers_that_share_one_matrix():
    one, other = nn.LSTM(SIZE, SIZE), nn.LSTM(SIZE, SIZE)
    other.weight_hh_l0 = one.weight_hh_l0
    for _ in range(2):
        assert_current(one)
        assert_current(other)
        one_element(other)


def test_parametrizations():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.by = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, w):
            return w * self.by

    module = nn.LSTM(SIZE, SIZE)
    parametrize.register_parametrization(module, "weight_hh_l0", Scale())
    for by in (1.0, 2.0, 0.5):
        module.parametrizations.weight_hh_l0[0].by.data.fill_(by)
        assert_current(module)


def test_more_weights_than_are_kept():
    modules = [nn.LSTM(512, 512) for _ in range(12)]  # 8 MiB each, of 64 that are kept
    x = torch.randn(3, 1, 512)
    with torch.no_grad():
        first = [m(x)[0] for m in modules]
        again = [m(x)[0] for m in modules[::-1]][::-1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_threads():
    modules = [nn.LSTM(SIZE, SIZE) for _ in range(3)]
    x = x_of(modules[0])
    expected = [fresh(m)(x)[0].detach() for m in modules]
    wrong = []

    def work(first):
        with torch.no_grad():
            for i in range(200):
                k = (first + i) % 3
                if not torch.equal(modules[k](x)[0], expected[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_while_weights_change():
    """Each thread has its own weights; their copies come and go in one table."""
    wrong = []

    def work(seed):
        module = nn.LSTM(SIZE, SIZE)
        x = x_of(module)
        with torch.no_grad():
            for i in range(60):
                module.weight_hh_l0.data.uniform_(-0.1, 0.1)
                found = module(x)[0], module(x)[0]
                module.weight_hh_l0.data = module.weight_hh_l0.data.clone()
                expected = module(x)[0]
                if not all(torch.equal(y, expected) for y in found):
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
