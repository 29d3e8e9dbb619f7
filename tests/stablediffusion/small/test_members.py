"""The bundled members: what they are tuned on, what their files say, and that blends of them draw."""

import json
import math

import pytest
import torch

from sdeblend import Preference, cli
from stablediffusion import load_members
from stablediffusion.making import members
from stablediffusion.rewards import REWARDS
from stablediffusion.scenes.captions import Scene, Thing, held_out
from stablediffusion.small import demo, load_small
from stablediffusion.small.candidates import SCORED, averaged, candidates, make_pool, tilt_kl
from stablediffusion.small.cells import draw_cell
from stablediffusion.small.files import GUIDANCE, MEMBERS, bundled_member, bundled_names
from tests.support.strategies import refuses

PROMPTS = ("a large red circle on a striped blue background", "a ring on a checkered background")


@pytest.fixture(scope="module")
def pipe():
    return load_small()


@pytest.fixture
def loaded(pipe):
    found = load_members(pipe, {name: bundled_member(name) for name in ("compress", "vivid")})
    yield found
    found.remove()


@pytest.fixture(scope="module")
def small_pool(pipe, tmp_path_factory):
    """Two shards of four captions with 48 candidates each, in a folder."""
    folder = tmp_path_factory.mktemp("pool")
    return make_pool(pipe, folder, range(2), count=48, each=4), folder


def test_shards_depend_on_their_number_alone_and_are_kept(pipe, small_pool, tmp_path):
    pool, folder = small_pool
    assert pool.latents.shape == (8, 48, 4, 8, 8) and len(pool.captions) == 8
    alone = make_pool(pipe, tmp_path, [1], count=48, each=4)
    assert alone.captions == pool.captions[4:] and torch.equal(alone.latents, pool.latents[4:])
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = make_pool(pipe, folder, range(2), count=48, each=4)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert all(torch.equal(again.rewards[name], pool.rewards[name]) for name in SCORED)
    seen = (pipe.vae.decode(pool.latents[0].float()).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pool.rewards["vivid"][0], REWARDS["vivid"](seen, None), atol=1e-5, rtol=1e-5)


def test_candidates_may_be_the_bases_own_samples(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("stablediffusion.small.candidates.OWN_STEPS", 3)
    pool = make_pool(pipe, tmp_path / "a", [0], count=3, each=2, own=True)
    assert pool.latents.shape == (2, 3, 4, 8, 8) and float(pool.latents.float().std(1).mean()) > 0.1
    again = make_pool(pipe, tmp_path / "b", [0], count=3, each=2, own=True)
    assert torch.equal(again.latents, pool.latents) and torch.equal(again.rewards["align"], pool.rewards["align"])
    drawn = make_pool(pipe, tmp_path / "c", [0], count=3, each=2)
    assert drawn.captions == pool.captions and not torch.equal(drawn.latents, pool.latents)
    assert members.recipe_of("align").own and not members.recipe_of("vivid").own


def test_tilts_move_the_rewards_and_the_control_does_not(small_pool):
    pool, _ = small_pool

    def moved(recipe, reward):
        weights = pool.log_weights(recipe.weights, recipe.kl_weight)
        assert torch.allclose(weights.exp().sum(1), torch.ones(8, dtype=torch.float64))
        values = pool.rewards[reward].double() / pool.scale(reward)
        return float(((weights.exp() * values).sum(1) - values.mean(1)).mean()), tilt_kl(weights)

    gain, nats = moved(members.RECIPES["compress"], "compress")
    less, fewer = moved(members.RECIPES["compress-half"], "compress")
    assert gain > less > 0 and nats > fewer > 0
    assert moved(members.RECIPES["control"], "compress") == pytest.approx((0, 0), abs=1e-9)
    assert nats < math.log(48)
    both = members.RECIPES["morl-50"]
    assert moved(both, "compress")[0] < gain and moved(both, "vivid")[0] > 0
    assert members.recipe_of("vivid@0.5") == members.Recipe({"vivid": 1.0}, 0.5)
    refuses(lambda: members.recipe_of("vivid@much"), "a member must be one of", "'vivid@much'")


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
    mentioned = Scene((Thing("circle", "red"),), "blue")
    found = candidates(mentioned, 50, torch.Generator().manual_seed(0))
    assert len(found) == 50 and len({(s.texture, s.things[0].position) for s in found}) > 5
    assert all(s.things[0].shape == "circle" and s.things[0].colour == "red" for s in found)
    assert all(s.background == "blue" and not held_out(s) for s in found)


def test_a_step_on_tilted_drawings_reaches_the_adapter_alone(small_pool):
    pool, _ = small_pool
    model = members.tunable(load_small())
    log_weights = pool.log_weights({"vivid": 1.0}, 0.125)
    loss = members.tilted_loss(model, pool, log_weights, torch.Generator().manual_seed(1), batch=8)
    loss.backward()
    assert any(float(p.grad.abs().sum()) > 0 for p in model.trainable().values())
    own = {id(p) for p in model.trainable().values()}
    frozen = [p for p in model.pipe.unet.parameters() if id(p) not in own]
    assert frozen and all(p.grad is None for p in frozen)


def test_times_are_of_the_table_and_mostly_noisy():
    t = members._times(20_000, torch.Generator().manual_seed(0))
    assert float(t.min()) >= 1e-3 and float(t.max()) == 1.0
    torch.testing.assert_close(t * 1000, (t * 1000).round())
    assert float((t <= members.RESOLVED).double().mean()) == pytest.approx(members.ANCHORED, abs=0.015)
    assert float((t > 0.5).double().mean()) == pytest.approx(members.NOISY, abs=0.015)


def test_a_member_is_tuned_and_its_file_says_at_what(pipe, small_pool, tmp_path):
    pool, _ = small_pool
    facts = members.tune("vivid@0.5", pool, tmp_path / "states", tmp_path / "v.safetensors", steps=2)
    assert facts["steps"] == 2 and 0 < facts["gain_of_target"] < facts["kl_of_target"] / 0.5 + 2
    found = load_members(pipe, {"v": tmp_path / "v.safetensors"})
    assert found["v"].kl_weight == 0.5 and dict(found["v"].reward) == {"vivid": 1.0}
    assert found["v"].scales["vivid"] == pytest.approx(pool.scale("vivid"))
    found.remove()


def test_files_are_small_and_say_what_they_are(loaded):
    assert {"compress", "vivid", "align", "compress-half", "morl-25", "morl-50", "morl-75"} <= {*bundled_names()}
    assert "control" not in bundled_names() and bundled_member("compress+vivid") == bundled_member("morl-50")
    assert all(path.stat().st_size < 5e5 for path in MEMBERS.glob("*.safetensors"))
    assert loaded["compress"].kl_weight == members.KL_WEIGHT
    assert dict(loaded["vivid"].reward) == {"vivid": 1.0}
    refuses(lambda: bundled_member("nothing"), "the bundled model's members are")


def test_one_member_is_the_same_blended_and_averaged_and_strength_zero_is_the_base(pipe, loaded):
    settings = {"prompts": PROMPTS, "each": 1, "steps": 4}
    alone = [draw_cell(pipe, loaded, Preference({"vivid": 1.0}), mode=m, **settings) for m in ("mpa", "soup")]
    torch.testing.assert_close(alone[0].images, alone[1].images, atol=1e-4, rtol=0)
    bases = [draw_cell(pipe, loaded, Preference({name: 0.0}), **settings) for name in ("compress", "vivid")]
    assert torch.equal(bases[0].images, bases[1].images)
    assert float((alone[0].images - bases[0].images).abs().mean()) > 1e-3
    mixed = draw_cell(pipe, loaded, Preference({"compress": 0.5, "vivid": 0.5}), **settings)
    assert bool((mixed.nats > 0).all()) and float(alone[0].nats.abs().max()) < 1e-9
    assert mixed.evaluations == 2 * alone[0].evaluations


def test_generate_needs_no_model(tmp_path, capsys):
    prompt = ["--prompt", PROMPTS[0], "--images", "1", "--steps", "2", "--out", str(tmp_path / "run")]
    assert cli.main(["generate", "--weights", "compress=0.3,vivid=0.7", *prompt]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["model"] == "bundled" and record["settings"]["guidance"] == GUIDANCE
    assert cli.main(["generate", "--weights", "dull=1", *prompt[:-1], str(tmp_path / "other")]) == 2
    assert "the bundled model's members are" in capsys.readouterr().err


def test_the_demo_draws_its_sheet(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "sheet.png"), "--images", "4", "--steps", "2"]) == 0
    numbers = json.loads((tmp_path / "sheet.json").read_text())
    assert len(numbers) == len(demo.MODES) * len(demo.WEIGHTS)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "certificate" in capsys.readouterr().out
