"""Images as a backend of evaluations: its scores, rewards and measures, every method, bad input, shared work."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdeblend.evaluate.figures import sheets
from sdeblend.evaluate.plan import CONFIGS, load_plan
from sdeblend.evaluate.run import evaluate
from sdeblend.evaluate.store import Folder, load
from sdeblend.methods.case import Drawn, NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.registry import METHODS
from sdeblend.preference import Preference
from sdeblend.reward import Reward
from sdeblend.shell.cli import main as cli
from sdeblend.shell.processes import Processes
from stablediffusion.adapters.members import load_members
from stablediffusion.blending.latents import SoupScore, pipeline_score
from stablediffusion.evaluate import backend as backend_module
from stablediffusion.rewards import REWARDS
from stablediffusion.testing import tiny_lora, tiny_pipeline
from tests.support.strategies import refuses

CPU = torch.device("cpu")
TABLE = {
    "kind": "pipeline",
    "captions": 2,
    "guidances": [1.5],
    "steps": 4,
    "report": ["align", "correct"],
    "members": {"compress": "compress", "vivid": "vivid"},
    "tuned": [{"weights": [0.5, 0.5], "member": "morl-50"}],
    "pairs": {"compress+vivid": "compress+vivid"},
    "half": {"compress": "compress-half"},
    "gradients": {"compress": "compress-smooth"},
}
ALONE = {"tuned": None, "pairs": None, "half": None}
EQUAL, FIRST = Preference({"compress": 0.5, "vivid": 0.5}), Preference({"compress": 1.0, "vivid": 0.0})


def build(**changes):
    table = {k: v for k, v in (TABLE | changes).items() if k != "kind" and v is not None}
    return backend_module.build(table, file="c.toml", seed=0, device=CPU)


@pytest.fixture(scope="module")
def backend():
    return build()


@pytest.fixture(scope="module")
def case(backend):
    return backend.case(backend.variants[0].name, backend.prompts[0])


def draws(case, count=3):
    return Draws(0, case.prompt, range(count))


def test_the_base_is_what_ddim_samples(backend, case):
    """The same start and step noise through diffusers' own scheduler, whose last step also goes to t = 0."""
    noise, rows = draws(case), 3
    scheduler = DDIMScheduler.from_config(backend.pipe.scheduler.config, set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    text, empty = backend.pipe.encode_prompt(case.prompt, CPU, rows, True, negative_prompt="")
    x = noise.start(case.like, 1.0) * case.schedule.prior_std()
    with torch.no_grad():
        for n, t in enumerate(scheduler.timesteps):
            out = backend.pipe.unet(torch.cat([x, x]), t, torch.cat([empty, text])).sample
            minus, plus = out.chunk(2)
            z = noise.normal(n + 1, case.like.shape).float()
            v = minus + 1.5 * (plus - minus)
            x = scheduler.step(v, t, x, eta=1.0, variance_noise=z).prev_sample
    drawn = METHODS["base"](case, EQUAL, draws(case))
    torch.testing.assert_close(drawn.samples, x, atol=2e-4, rtol=1e-4)
    off = METHODS["mpa"](case, EQUAL, draws(case)).samples
    assert float((off - x).abs().max()) > 1e-2


def test_soups_of_scores_are_those_of_weights_added_by_hand(tmp_path):
    pipe, files = tiny_pipeline("sd15", seed=3), {}
    plain = copy.deepcopy(pipe.unet)
    for seed, name in enumerate(("a", "b")):
        files[name] = tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=seed, scale=2.0)
    members = load_members(pipe, files)
    shares = {"a": 0.7, "b": 0.2}
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.5, dtype=torch.float64)
    base = pipeline_score(pipe, "a ring", guidance_scale=1.0, images=4)
    before = base(x, t)[0]
    for mode in ("soup", "soup-factors"):
        merged = copy.deepcopy(plain)
        with torch.no_grad():
            for name, layer in pipe.unet.named_modules():
                if "a" not in getattr(layer, "lora_A", {}):
                    continue
                down, up = ([getattr(layer, f)[k].weight for k in shares] for f in ("lora_A", "lora_B"))
                scaled = [w * layer.scaling[k] for k, w in shares.items()]
                if mode == "soup":
                    change = sum(w * u @ d for w, u, d in zip(scaled, up, down, strict=True))
                else:
                    change = sum(w * u for w, u in zip(scaled, up, strict=True)) @ sum(
                        w * d for w, d in zip(shares.values(), down, strict=True)
                    )
                merged.get_submodule(name).weight += change
        soup = SoupScore(base, members, Preference({k: w / 1.3 for k, w in shares.items()}, strength=1.3), mode)
        found = soup(x, t)
        other = tiny_pipeline("sd15", seed=3)
        other.unet.load_state_dict(merged.state_dict())
        expected = pipeline_score(other, "a ring", guidance_scale=1.0, images=4)(x, t)[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert float((found - before).abs().max()) > 1e-2
        index = torch.tensor([3, 1])
        torch.testing.assert_close(soup.rows(index)(x[index], t), found[index], atol=1e-5, rtol=1e-5)
    assert torch.equal(base(x, t)[0], before)  # nothing stays active
    whole = load_members(pipe, {"network": copy.deepcopy(plain)})
    refuses(lambda: SoupScore(base, whole, {"network": 1.0}, "soup"), "'network'")


def test_every_method_draws_or_says_why_not(case):
    reasons = {}
    for wanted in (EQUAL, FIRST):
        for name, method in METHODS.items():
            options = {"candidates": 2} if "candidates" in method.options.model_fields else {}
            try:
                drawn = method(case, wanted, draws(case), **options)
            except NotApplicable as reason:
                reasons[name, wanted is EQUAL] = str(reason)
                continue
            assert drawn.samples.shape == (3, 4, 8, 8) and bool(drawn.samples.isfinite().all()), name
    assert reasons == {
        ("kla", True): "it blends the base with one member; see DB-MPA for more",
        ("quadratic", True): "it needs members that are not there (half)",
    }


def test_members_are_found_by_what_they_were_tuned_for(case):
    x, t = case.like[None] + 0.3, torch.tensor(0.6, dtype=torch.float64)
    stack = case.stack(1)(x, t)
    assert len(stack) == 3
    torch.testing.assert_close(case.score("exact", FIRST, 1)(x, t), stack[1])
    half = case.score("exact", EQUAL, 1)(x, t)
    pair, names = case.higher_order("pairs", EQUAL, 1)
    assert names == ("base", "compress", "vivid", "compress+vivid")
    torch.testing.assert_close(pair(x, t)[3], half)
    for lost in (Preference({"compress": 0.3, "vivid": 0.7}), Preference(dict(EQUAL.weights), 2.0)):
        assert case.score("exact", lost, 1) is None
    assert case.kl_weight == 0.125


def test_rewards_are_in_units_of_the_members_files_and_methods_see_the_same(backend, case):
    drawn = METHODS["base"](case, EQUAL, draws(case))
    values = case.rewards(drawn.samples)
    assert list(values) == ["compress", "vivid", "align", "correct"]
    images = case.decode(drawn.samples)
    scale = case.members[case.roles["member:vivid"]].scales["vivid"]
    torch.testing.assert_close(values["vivid"], REWARDS["vivid"](images, None) / scale)
    torch.testing.assert_close(case.reward("vivid")(drawn.samples), values["vivid"])
    x = drawn.samples.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case.differentiable("compress")(x).sum(), x)
    assert float(gradient.abs().max()) > 0
    plain = build(gradients=None)
    assert plain.case(plain.variants[0].name, plain.prompts[0]).differentiable("compress") is None


def test_batches_are_cut_and_nothing_else_changes(case):
    whole = METHODS["code"](case, EQUAL, draws(case), candidates=2, block=2).samples
    soup = METHODS["soup"](case, EQUAL, draws(case)).samples
    cut = build(batch=4)
    parts = cut.case(cut.variants[0].name, cut.prompts[0])
    found = METHODS["code"](parts, EQUAL, draws(parts), candidates=2, block=2).samples
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
    found = METHODS["soup"](parts, EQUAL, draws(parts)).samples
    torch.testing.assert_close(found, soup, atol=1e-4, rtol=1e-4)


def test_moved_and_diversity(case):
    described = {name: case.describe(METHODS[name](case, EQUAL, draws(case)), draws(case)) for name in
                 ("base", "mpa")}  # fmt: skip
    assert described["base"]["moved"] == pytest.approx(0, abs=1e-6) and described["mpa"]["moved"] > 1e-3
    drawn = METHODS["base"](case, EQUAL, draws(case))
    images = case.decode(drawn.samples)
    pairs = [(images[i] - images[j]).square().mean().sqrt() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert described["base"]["diversity"] == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-4)
    ancestors = torch.tensor([2, 2, 0])
    assert case.describe(Drawn(drawn.samples[ancestors], 1.0), draws(case))["moved"] > 1e-3
    again = case.describe(Drawn(drawn.samples[ancestors], 1.0, ancestors=ancestors), draws(case))
    assert again["moved"] == pytest.approx(0, abs=1e-5)
    chosen = METHODS["best-of-n"](case, EQUAL, draws(case), candidates=2)
    assert case.describe(chosen, draws(case)).keys() == {"diversity"}


CONFIG = """
title = "two captions"
[backend]
kind = "pipeline"
captions = 2
guidances = [1.0]
steps = 2
[backend.members]
compress = "compress"
vivid = "vivid"
[grid]
methods = ["mpa", "base", "soup", "kla"]
preferences = ["equal", [1.0, 0.0]]
seeds = 4
block = 2
[report]
resamples = 100
"""


def run(tmp_path, out, text=CONFIG, **options):
    file = tmp_path / "c.toml"
    file.write_text(text)
    return evaluate(load_plan(file), Folder(tmp_path / out), world=options.pop("world", Processes()), **options)


def test_a_run_keeps_images_and_two_processes_equal_one(tmp_path):
    assert run(tmp_path, "one") == []
    for rank in (0, 1):
        run(tmp_path, "two", resume=True, world=Processes(rank, 2))
    one, two = Folder(tmp_path / "one"), Folder(tmp_path / "two")
    assert one.stored() == two.stored() and len(one.stored()) == 2 * 2 * 2 * 4
    for key in one.stored():
        (record, rows, _), (other, same, _) = one.read(key), two.read(key)
        assert rows == same and record == other.model_copy(update={"seconds": record.seconds})
        if rows:
            assert record.measures.keys() == {"moved", "diversity"}
            place = rows[1].image
            with Image.open(tmp_path / "one" / place.file) as image:
                tile = np.asarray(image.crop(place.box))
            assert tile.shape == (32, 32, 3) and tile.std() > 5
    (stored,) = load([one])
    drawn = sheets(stored)
    assert list(drawn) == ["sheet"] and drawn["sheet"].startswith(b"\x89PNG")
    (tmp_path / "one" / place.file).unlink()  # an image that was lost leaves a gap, not an error
    assert list(sheets(stored)) == ["sheet"]


OWN = """
[backend]
kind = "pipeline"
path = "{folder}/pipe"
prompts = ["a ring"]
guidances = [3.0]
steps = 3
dtype = "{dtype}"
members = {{ compress = "{folder}/0.safetensors", vivid = "{folder}/1.safetensors" }}
gradients = {{ compress = "vivid" }}
[grid]
methods = ["mpa", "base", "exact", "mpa-corrected", "mpa-reweighted", "ls-systematic", "soup", "soup-factors", "switch",
           "union", "code", "best-of-n", "guidance", "steer-difference"]
seeds = 2
[methods]
code = {{ candidates = 2, block = 2 }}
best-of-n = {{ candidates = 2 }}
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pipeline_of_ones_own_is_evaluated(tmp_path, dtype):
    pipe = tiny_pipeline("sd15", seed=3)
    pipe.save_pretrained(tmp_path / "pipe")
    for seed in range(2):
        path = tiny_lora(pipe, tmp_path / f"{seed}.safetensors", seed=seed, scale=0.5)
        with safe_open(path, "pt") as file:
            about = file.metadata() | {"sdeblend.kl_weight": "0.5"}
        save_file(load_file(path), path, about)
    assert run(tmp_path, "out", OWN.format(folder=tmp_path, dtype=dtype)) == []
    folder, moved = Folder(tmp_path / "out"), {}
    for record, rows, _ in map(folder.read, folder.stored()):
        name, reason = record.method, record.left_out
        assert (reason == "", len(rows)) == ((True, 2) if name != "exact" else (False, 0)), (name, reason)
        assert all(value is not None for row in rows for value in row.rewards.values()), name
        moved[name] = record.measures.get("moved")
    # Two particles are too few to be resampled.
    unmoved = {"base": 0, "steer-difference": 0, "exact": None, "code": None, "best-of-n": None}
    assert {name: value for name, value in moved.items() if not value} == unmoved and len(moved) == 14


def test_a_reward_that_fails_on_one_image_costs_that_image_alone(tmp_path, monkeypatch):
    def picky(images, condition):
        values = images.mean((1, 2, 3))
        return torch.where(values == values.max(), torch.nan, values) if len(images) == 2 else values

    monkeypatch.setitem(REWARDS, "picky", Reward("picky", picky, True, "none"))
    notes = run(tmp_path, "out", CONFIG.replace("steps = 2", 'steps = 2\nreport = ["picky"]'))
    assert len(notes) == 2 * 2 * (3 + 4) and all("reward 'picky' failed on image" in note for note in notes)
    folder = Folder(tmp_path / "out")
    rows = [row for key in folder.stored() for row in folder.read(key)[1]]
    lost = [row.rewards["picky"] is None for row in rows]
    assert sum(lost) == len(rows) / 2 == len(list((tmp_path / "out" / "failed").glob("*.png")))
    assert all(row.rewards["vivid"] is not None for row in rows)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"members": None}, ["needs a member for each reward"]),
        ({**ALONE, "members": {"compress": "nothing.safetensors"}}, ["nothing.safetensors"]),
        ({**ALONE, "members": {"beauty": "vivid"}, "gradients": None}, ["reward", "'beauty'"]),
        ({**ALONE, "members": {"compress": "compress"}, "pairs": TABLE["pairs"]}, ["pairs must be of none", "vivid'"]),
        ({"pairs": {"vivid+compress": "morl-50"}}, ["pairs must be of compress+vivid, got 'vivid+compress'"]),
        ({"half": {"compres": "compress-half"}}, ["half must be of compress, vivid, got 'compres'"]),
        ({"gradients": {"compres": "vivid"}}, ["[backend] gradients must be of compress, vivid, got 'compres'"]),
        ({"gradients": {"compress": 1}}, ["[backend.gradients] compress must be the name of a reward, got 1"]),
        ({"scales": {"vivd": 2.0}}, ["[backend] scales must be of compress, vivid, align, correct, got 'vivd'"]),
        ({"scales": {"vivid": 0.0}}, ["[backend.scales] vivid must be a finite number above 0, got 0.0"]),
        ({"tuned": [{"weights": [1.0], "member": "vivid"}]}, ["a weight for each of compress, vivid"]),
        ({"tuned": [{"member": "vivid"}]}, ["[[backend.tuned]] 1 weights is missing"]),
        ({"half": {"compress": 3}}, ["[backend.half] compress must be a file"]),
        ({"steps": 1}, ["steps must be an integer of at least 2, got 1"]),
        ({"eta": 1.5}, ["eta must be a finite number from 0 to 1, got 1.5"]),
        ({"prompts": ["a ring", "a ring"]}, ["prompts must differ"]),
        ({"prompts": "no-such-file.txt"}, ["readable text file", "no-such-file.txt"]),
        ({"path": "no-such-folder", "prompts": ["a ring"]}, ["path must be a folder or hub id"]),
        ({"path": "somewhere", "prompts": None}, ["prompts is missing"]),
        ({"sets": [{"name": "a", "members": {"compress": "compress"}}, {"name": "b", "members": {"vivid": "vivid"}}]},
         ["set 'b' needs a member for each reward (compress), got vivid"]),
        ({"sets": [{"name": "a", "members": {"compress": "compress"}}] * 2}, ["a name of its own"]),
        ({"report": ["hpsv2"]}, ["hpsv2", "folder"]),
        ({"rewards": {"hpsv2": "x"}}, ["[backend.rewards]", "'hpsv2'"]),
        ({"surprise": 1}, ["unknown key 'surprise'"]),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_sentence(changes, parts):
    def call():
        found = build(**changes)
        found.case(found.variants[0].name, found.prompts[0]).rewards(torch.zeros(1, 4, 8, 8))

    refuses(call, "c.toml", *parts)


def test_a_corrected_blend_without_noise_is_left_out():
    still = build(eta=0.0)
    case = still.case(still.variants[0].name, still.prompts[0])
    with pytest.raises(NotApplicable, match="solver with noise"):
        METHODS["mpa-corrected"](case, EQUAL, draws(case))


def test_sets_and_guidances_are_variants():
    sets = [{"name": name, "members": {"compress": member}} for name, member in
            (("strong", "compress"), ("weak", "compress-half"))]  # fmt: skip
    found = build(sets=sets, guidances=[1.0, 3.0], **dict.fromkeys(("members", "tuned", "pairs", "half")))
    assert [(v.name, v.values) for v in found.variants] == [
        ("strong, guidance 1", {"guidance": 1.0, "kl_weight": 0.125}),
        ("strong, guidance 3", {"guidance": 3.0, "kl_weight": 0.125}),
        ("weak, guidance 1", {"guidance": 1.0, "kl_weight": 0.25}),
        ("weak, guidance 3", {"guidance": 3.0, "kl_weight": 0.25}),
    ]
    assert found.case("weak, guidance 3", found.prompts[0]).kl_weight == 0.25
    assert len(found.identity) == 3  # the base and two files


def test_bundled_configurations_are_read_and_those_with_weights_say_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = load_plan(CONFIGS / "bundled-images.toml")
    cells = plan.cells(plan.backend())
    assert len(cells) == 16 * 5 * len(plan.grid.methods) and len(plan.grid.preferences) == 5
    for name, lacks in (("bundled-soup", "compress@1.safetensors"), ("paper-sd15", "members/imagereward.safetensors")):
        assert cli(["evaluate", name]) == 2
        assert lacks in capsys.readouterr().err
    assert json.loads(json.dumps(plan.fixed()))["backend.captions"] == 16


def test_the_distance_to_tilted_drawings_sees_a_blend_and_not_exact_samples(case):
    """The target's own drawings have the floor; pictures far above it in reward do not, whatever their mean."""
    wanted, target = FIRST, case.target
    assert target is not None and target.rewards["compress"].shape == (512,)
    exact = target.rewards["compress"]
    law = (exact / case.kl_weight).softmax(0)
    drawn = METHODS["base"](case, wanted, draws(case, 8))
    found = case.measure(drawn, wanted)["W1 of r(w)"]
    by_hand = REWARDS["compress"](case.decode(drawn.samples), None).double() / case.scale("compress")
    levels = (torch.arange(20_000).double() + 0.5) / 20_000
    order = exact.argsort()
    quantiles = exact[order][torch.searchsorted(law[order].cumsum(0), levels).clamp(max=511)]
    own = by_hand.sort().values[(levels * 8).long()]
    assert found.value == pytest.approx(float((own - quantiles).abs().mean()), rel=2e-2, abs=2e-3)
    assert 0 < found.floor < found.value and found.floor_sd > 0
    lost = drawn.samples.clone()
    lost[0] = torch.nan
    # It stays in its column, for other blocks have it.
    assert math.isnan(case.measure(Drawn(lost, 1.0), wanted)["W1 of r(w)"].value)
    expected = case.expected(wanted)
    assert expected["compress"] == pytest.approx(float((law * exact).sum()), rel=1e-6)
    assert expected["compress"] > float(exact.mean()) and set(expected) == {"compress", "vivid"}
    none = build(candidates=0)
    assert none.case(none.variants[0].name, none.prompts[0]).measure(drawn, wanted) == {}
