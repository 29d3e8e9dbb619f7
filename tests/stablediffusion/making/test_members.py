"""How the bundled members are made: what they are tuned on, a step of it, and what their files say."""

import math

import pytest
import torch

from stablediffusion import load_members
from stablediffusion.making import recipes, tune_members
from stablediffusion.making.shards import averaged, draw_shards, tilt_kl
from stablediffusion.rewards import REWARDS
from stablediffusion.scenes.captions import held_out
from stablediffusion.small import load_small
from stablediffusion.small.candidates import SCORED, scenes_of
from tests.support.strategies import refuses


@pytest.fixture(scope="module")
def pipe():
    return load_small()


@pytest.fixture(scope="module")
def two_shards(pipe, tmp_path_factory):
    """Two shards of four captions with 48 candidates each, in a folder."""
    folder = tmp_path_factory.mktemp("drawings")
    return draw_shards(pipe, folder, range(2), count=48, each=4), folder


def test_shards_depend_on_their_number_alone_and_are_kept(pipe, two_shards, tmp_path):
    drawn, folder = two_shards
    assert drawn.latents.shape == (8, 48, 4, 8, 8) and len(drawn.captions) == 8
    alone = draw_shards(pipe, tmp_path, [1], count=48, each=4)
    assert alone.captions == drawn.captions[4:] and torch.equal(alone.latents, drawn.latents[4:])
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = draw_shards(pipe, folder, range(2), count=48, each=4)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert all(torch.equal(again.rewards[name], drawn.rewards[name]) for name in SCORED)
    seen = (pipe.vae.decode(drawn.latents[0].float()).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn.rewards["vivid"][0], REWARDS["vivid"](seen, None), atol=1e-5, rtol=1e-5)


def test_candidates_may_be_the_bases_own_samples(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("stablediffusion.making.shards.OWN_STEPS", 3)
    drawn = draw_shards(pipe, tmp_path / "a", [0], count=3, each=2, own=True)
    assert drawn.latents.shape == (2, 3, 4, 8, 8) and float(drawn.latents.float().std(1).mean()) > 0.1
    again = draw_shards(pipe, tmp_path / "b", [0], count=3, each=2, own=True)
    assert torch.equal(again.latents, drawn.latents) and torch.equal(again.rewards["align"], drawn.rewards["align"])
    other = draw_shards(pipe, tmp_path / "c", [0], count=3, each=2)
    assert other.captions == drawn.captions and not torch.equal(other.latents, drawn.latents)
    assert recipes.recipe_of("align").own and not recipes.recipe_of("vivid").own


def test_tilts_move_the_rewards_and_the_control_does_not(two_shards):
    drawn, _ = two_shards

    def moved(recipe, reward):
        weights = drawn.log_weights(recipe.weights, recipe.kl_weight)
        assert torch.allclose(weights.exp().sum(1), torch.ones(8, dtype=torch.float64))
        values = drawn.rewards[reward].double() / drawn.scale(reward)
        return float(((weights.exp() * values).sum(1) - values.mean(1)).mean()), tilt_kl(weights)

    gain, nats = moved(recipes.RECIPES["compress"], "compress")
    less, fewer = moved(recipes.RECIPES["compress-half"], "compress")
    assert gain > less > 0 and nats > fewer > 0
    assert moved(recipes.RECIPES["control"], "compress") == pytest.approx((0, 0), abs=1e-9)
    assert nats < math.log(48)
    both = recipes.RECIPES["morl-50"]
    assert moved(both, "compress")[0] < gain and moved(both, "vivid")[0] > 0
    assert recipes.recipe_of("vivid@0.5") == recipes.Recipe({"vivid": 1.0}, 0.5)
    refuses(lambda: recipes.recipe_of("vivid@much"), "a member must be one of", "'vivid@much'")


def test_averages_over_candidates_are_posterior_means_in_the_mean():
    """One dimension, z ~ N(0, 1) tilted by exp(b z); z given x is Gaussian, with a mean known in closed form."""
    generator = torch.Generator().manual_seed(0)
    sets, count, alpha, sigma = 20_000, 64, 0.5, 0.9
    a, s = (torch.full((sets,), v, dtype=torch.float64) for v in (alpha, sigma))

    def z_score(error):
        return float(error.mean() / (error.std() / math.sqrt(sets)))

    for b in (0.0, 0.8):
        z = torch.randn(sets, count, 1, generator=generator)
        log_weights = (b * z[..., 0]).double().log_softmax(1)
        chosen = torch.multinomial(log_weights.exp(), 1, generator=generator)[:, 0]
        own = z[torch.arange(sets), chosen]
        x = alpha * own + sigma * torch.randn(sets, 1, generator=generator)
        exact = (alpha * x / sigma**2 + b) / (alpha**2 / sigma**2 + 1)
        found = averaged(z, log_weights, x, a, s)
        for with_x in (torch.ones_like(x), x, x.square()):
            assert abs(z_score((found - own) * with_x)) < 5
        assert float((found - exact).std()) < 0.4 * float((own - exact).std())
        # The tilt of finitely many candidates falls short of the tilt itself by about b exp(b^2) / J.
        assert float((found - exact).mean()) == pytest.approx(-b * math.exp(b**2) / count, abs=0.01)
    # the control: without the candidate that the state came from, the average forgets it
    others = log_weights.scatter(1, chosen[:, None], -torch.inf)
    assert abs(z_score((averaged(z, others, x, a, s) - own) * x)) > 5
    for i in range(3):
        logits = [log_weights[i, j] - (x[i] - alpha * z[i, j]).square().sum() / (2 * sigma**2) for j in range(count)]
        torch.testing.assert_close(found[i], torch.stack(logits).softmax(0).float() @ z[i], atol=1e-5, rtol=1e-5)


def test_candidates_keep_what_the_caption_says():
    found = scenes_of("a red circle on a blue background", 50, torch.Generator().manual_seed(0))
    assert len(found) == 50 and len({(s.texture, s.things[0].position) for s in found}) > 5
    assert all(s.things[0].shape == "circle" and s.things[0].colour == "red" for s in found)
    assert all(s.background == "blue" and not held_out(s) for s in found)
    free = scenes_of("", 50, torch.Generator().manual_seed(0))
    assert len({s.background for s in free}) > 4 and {len(s.things) for s in free} == {1, 2}


def test_a_step_on_tilted_drawings_reaches_the_adapter_alone(two_shards):
    drawn, _ = two_shards
    model = tune_members.tunable(load_small())
    log_weights = drawn.log_weights({"vivid": 1.0}, 0.125)
    loss = tune_members.tilted_loss(model, drawn, log_weights, torch.Generator().manual_seed(1), batch=8)
    loss.backward()
    assert any(float(p.grad.abs().sum()) > 0 for p in model.trainable().values())
    own = {id(p) for p in model.trainable().values()}
    frozen = [p for p in model.pipe.unet.parameters() if id(p) not in own]
    assert frozen and all(p.grad is None for p in frozen)


def test_times_are_of_the_table_and_mostly_noisy():
    t = tune_members._times(20_000, torch.Generator().manual_seed(0))
    assert float(t.min()) >= 1e-3 and float(t.max()) == 1.0
    torch.testing.assert_close(t * 1000, (t * 1000).round())
    assert float((t <= tune_members.RESOLVED).double().mean()) == pytest.approx(tune_members.ANCHORED, abs=0.015)
    assert float((t > 0.5).double().mean()) == pytest.approx(tune_members.NOISY, abs=0.015)


def test_a_member_is_tuned_and_its_file_says_at_what(pipe, two_shards, tmp_path):
    drawn, _ = two_shards
    facts = tune_members.tune("vivid@0.5", drawn, tmp_path / "states", tmp_path / "v.safetensors", steps=2)
    assert facts["steps"] == 2 and 0 < facts["gain_of_target"] < facts["kl_of_target"] / 0.5 + 2
    found = load_members(pipe, {"v": tmp_path / "v.safetensors"})
    assert found["v"].kl_weight == 0.5 and dict(found["v"].reward) == {"vivid": 1.0}
    assert found["v"].scales["vivid"] == pytest.approx(drawn.scale("vivid"))
    found.remove()
