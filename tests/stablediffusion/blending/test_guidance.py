"""Guidance read off what the scheduler gets: any sum of the passes, and nothing else."""

from __future__ import annotations

import pytest
import torch

from sdeblend import Evaluation
from sdeblend.blend import combine
from stablediffusion.blending.guidance import after_guidance

COEFFICIENTS = torch.tensor([0.5, 0.8, -0.3], dtype=torch.float64)


def passes(branches, images, dtype=torch.float32, calls=1, seed=0):
    """Return the passes of a step, and the members' branches (K, J, B, 4, 6) and the blend's (J, B, 4, 6)."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 1, images, 4, 6, generator=generator)
    members = common + 0.3 * torch.randn(3, branches, images, 4, 6, generator=generator)
    out, seen = [], []
    for rows in members.chunk(calls, dim=1):
        # (K, B, G, ...): images with the branches in front of their event
        part = rows.transpose(1, 2)
        blended = combine(part, COEFFICIENTS)
        out.append((Evaluation(blended, part, COEFFICIENTS, (0, 1, 2)), blended.to(dtype)))
        seen += list(out[-1][1].transpose(0, 1))
    return out, members, torch.stack(seen)


def weigh(branches, *weights):
    return sum(w * b for w, b in zip(weights, branches, strict=True))


KINDS = {
    "none": (1, 1, (1.0,)),
    "one batch": (2, 1, (-6.5, 7.5)),
    "two calls": (2, 2, (-3.0, 4.0)),
    "positive first": (2, 2, (5.0, -4.0)),
    "perturbed": (3, 1, (-4.0, 8.0, -3.0)),
    "skipped layers in a second call": (3, 3, (-6.0, 9.8, -2.8)),
    "negated": (2, 1, (4.0, -5.0)),
    "off in this step": (2, 1, (0.0, 1.0)),
}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sum_of_the_passes_is_found(kind, images):
    branches, calls, weights = KINDS[kind]
    given, members, blended = passes(branches, images, calls=calls)
    found = after_guidance(given, weigh(blended, *weights))
    assert found is not None
    expected = torch.stack([weigh(member, *weights) for member in members])
    torch.testing.assert_close(found.members, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.score, weigh(blended, *weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [1, 3])
def test_what_is_no_sum_is_told_apart(images):
    """Rescaled and projected guidance; one image's rescaling is a multiple, and its weights do not sum to one."""
    given, _, (negative, positive) = passes(2, images)
    plain = negative + 5 * (positive - negative)

    def per_image(value):
        return value.flatten(1).norm(dim=1).reshape(-1, 1, 1)

    rescaled = plain * per_image(positive) / per_image(plain)
    along = (negative * positive).flatten(1).sum(1).reshape(-1, 1, 1) / per_image(negative) ** 2
    zero_star = along * negative + 5 * (positive - along * negative)
    difference = positive - negative
    onto = (difference * positive).flatten(1).sum(1).reshape(-1, 1, 1) / per_image(positive) ** 2 * positive
    projected = positive + 4 * (difference - onto)
    for output in (rescaled, zero_star, projected, plain.clamp(-1, 1), plain + 0.01 * plain.square()):
        assert after_guidance(given, output) is None
    assert after_guidance(given, plain) is not None  # the control


@pytest.mark.parametrize("scale", [1.0, 7.5, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_rule_of_its_own(dtype, scale):
    given, members, blended = passes(2, 4, dtype)
    negative, positive = blended
    output = negative + scale * (positive - negative)
    assert output.dtype == dtype
    found = after_guidance(given, output)
    assert found is not None
    expected = members[:, 0] + scale * (members[:, 1] - members[:, 0])
    assert float((found.members - expected).norm() / expected.norm()) < 0.02
    assert after_guidance(given, output * 0.7) is None


def test_what_the_scheduler_does_not_get_is_cut_off():
    """Tokens of a reference behind the state's, a predicted variance, a dimension of one frame."""
    given, members, (only,) = passes(1, 2)
    for output in (only[:, :3], only[:, :, :4], only[:, :, None]):
        found = after_guidance(given, output)
        assert found is not None and found.members.shape[1:] == output.shape
    assert after_guidance(given, only.flatten()[:10].reshape(2, 5)) is None
    assert after_guidance(given, torch.cat([only, only])[:3]) is None
    assert members.shape[0] == 3


def test_equal_branches_need_no_telling_apart():
    """An empty negative prompt that is the prompt: the first branch has the weight of both."""
    given, _, blended = passes(1, 2)
    evaluation, value = given[0]
    output = blended[0] + 7.5 * (blended[0] - blended[0])
    found = after_guidance([(evaluation, value), (evaluation, value)], output)
    assert found is not None
    torch.testing.assert_close(found.members, evaluation.members.squeeze(2), rtol=1e-5, atol=1e-5)
