"""Members on mixtures as files: the same bytes in every process, and on no other base."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from sdeblend import VPLinear
from tests.support.strategies import generator, refuses
from toy import GaussianMixture
from toy.networks.network import for_mixture
from toy.networks.tunable import MixtureTunable
from toy.problems import line2

SCHEDULE = VPLinear()


def tuned(*, exact: bool = False, seed: int = 0, base: GaussianMixture | None = None) -> MixtureTunable:
    """Return a model whose trainable part does something, on two modes or another mixture."""
    base = line2().base if base is None else base
    network = None if exact else for_mixture(base, SCHEDULE, seed=seed, width=16)
    model = MixtureTunable(base, SCHEDULE, network, width=16)
    with torch.no_grad():
        for value in model.trainable().values():
            value.normal_(generator=generator(2))
    return model


def test_a_member_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    # The library orders metadata by a hash of each process; in order of names it cannot.
    about = {f"sdeblend.{letter}": letter for letter in "hgfedcba"}
    content = tuned().save(tmp_path / "a", about).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(about)
    assert list(header) == sorted(header)
    assert tuned().save(tmp_path / "b", dict(reversed(about.items()))).read_bytes() == content


def test_a_member_of_another_base_is_refused(tmp_path: Path) -> None:
    for exact in (False, True):
        model = tuned(exact=exact)
        path = model.save(tmp_path / "a", {"sdeblend.base": model.identity()})
        assert tuned(exact=exact).load(path) == {"sdeblend.base": model.identity()}
        other = tuned(exact=True, base=line2().member("left")) if exact else tuned(seed=1)
        before = {name: value.detach().clone() for name, value in other.trainable().items()}
        wanted = ("the base it was tuned on", model.identity(), other.identity())
        refuses(partial(other.load, path), str(path), *wanted)
        assert all(torch.equal(value, before[name]) for name, value in other.trainable().items())
        # A file that does not say is taken at its word, as by load_members.
        other.load(model.save(tmp_path / "b", {}))
