"""Noise by (prompt, seed, candidate, step): the published generator, normal numbers, and independence of the batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from sdeblend.methods.draws import MAX_SEED, Draws, clock, philox
from tests.support.strategies import refuses


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_numbers_are_normal_and_uncorrelated():
    draws = Draws(3, "a prompt", range(4000))
    first, second = draws.normal(0, (5,)), draws.normal(1, (5,))
    for column in first.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(1.05 * first.flatten().numpy(), "norm").pvalue < 1e-2  # the control: 5 % too wide
    both = torch.cat([first, second, Draws(3, "another", range(4000)).normal(0, (5,))], 1)
    correlation = torch.corrcoef(both.T) - torch.eye(15)
    assert float(correlation.abs().max()) < 5 / 4000**0.5


@pytest.mark.rng_untouched
def test_a_seed_has_its_numbers_whatever_stands_beside_it():
    whole = Draws(0, "p", range(10))
    for event in [(3,), (2, 4), (5, 2, 2)]:
        part = Draws(0, "p", [7, 2]).normal(4, event)
        assert torch.equal(part, whole.normal(4, event)[[7, 2]])
        many = whole.normal(4, event, candidates=3)
        assert torch.equal(many[::3], whole.normal(4, event))
        assert not torch.equal(many[1::3], many[::3])
    again = Draws(0, "p", range(10))
    like = torch.zeros(10, 3)
    noise = whole.noise()(3, torch.tensor(0.5), torch.tensor(0.4), like)
    assert noise.dtype == torch.float32 and torch.equal(noise, again.normal(4, (3,)).float())
    assert not torch.equal(Draws(1, "p", range(10)).normal(4, (3,)), whole.normal(4, (3,)))
    kept = whole.noise()(3, torch.tensor(0.5), torch.tensor(0.4), like.double())
    kept.zero_()  # what a caller does with its noise stays with it
    assert torch.equal(whole.normal(4, (3,)), again.normal(4, (3,)))


def test_generators_of_the_batch_differ_by_stream_and_block():
    def first(draws, stream):
        return torch.rand(1, generator=draws.generator(stream)).item()

    draws = Draws(0, "p", range(10))
    assert first(draws, "a") == first(Draws(0, "p", range(10)), "a")
    assert len({first(draws, "a"), first(draws, "b"), first(Draws(0, "p", range(10, 20)), "a")}) == 3


def test_the_time_that_drawing_takes_is_known_and_waits_for_a_gpu(monkeypatch, slow_draws):
    draws = Draws(0, "p", range(4))
    for _ in range(2):  # kept the second time
        draws.normal(0, (3,))
    assert draws.seconds == 1.0
    for _ in range(2):  # those of further candidates are not
        draws.normal(0, (3,), 2)
    assert draws.seconds == 3.0 and clock() == 3.0
    waited = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(slow_draws[0]))
    assert clock() == 3.0 and waited == [3.0]


def test_what_cannot_be_drawn():
    refuses(lambda: Draws(0, "p", []), "seeds must be at least one")
    refuses(lambda: Draws(0, "p", [MAX_SEED]), "2^32 - 1")
    source = Draws(0, "p", range(4)).noise(2)
    refuses(lambda: source(0, torch.tensor(1.0), torch.tensor(0.9), torch.zeros(4, 2)), "8 rows", "asked for 4")
