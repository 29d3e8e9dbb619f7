"""Methods on a mixture: what each says it costs is what it evaluates, and all see the same noise."""

import re
import runpy

import pytest
import torch

from sdeblend.evaluate.plan import load_plan
from sdeblend.evaluate.run import evaluate
from sdeblend.evaluate.store import Folder
from sdeblend.methods.case import Drawn, NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.registry import METHODS
from sdeblend.preference import Preference
from sdeblend.score import ScoreStack
from sdeblend.select import select_members
from sdeblend.shell.processes import Processes
from sdeblend.shell.settings import describe
from tests.support.strategies import generator, refuses
from toy import MixtureStack
from toy.evaluate.backend import build
from toy.evaluate.case import MixtureCase

BATCH, STEPS = 40, 12
DEVICE = torch.device("cpu")
UNEQUAL = Preference({"right": 0.7, "up": 0.3})
SMALL = {"code": {"candidates": 3, "block": 5}, "best-of-n": {"candidates": 4}}


class Watching(ScoreStack):
    """A score function or a stack that tells a case what it evaluates, its rows too."""

    def __init__(self, inner, case):
        self.inner, self.case, self.names = inner, case, getattr(inner, "names", None)

    def __len__(self):
        return len(self.inner)

    def __call__(self, x, t, active=None):
        members = 1 if not isinstance(self.inner, MixtureStack) else len(self if active is None else active)
        self.case.evaluations += members * len(x)
        if float(t) == float(self.case.grid[0]):
            self.case.starts.append(x.detach().clone())
        return self.inner(x, t) if active is None else self.inner(x, t, active)

    def rows(self, index):
        return self


class Watched(MixtureCase):
    """A case that counts members times rows and rows rewarded, and remembers the states at the first time."""

    def __init__(self, problem, solver, variant):
        super().__init__(problem, solver, variant)
        self.evaluations, self.rewarded, self.starts = 0, 0, []

    def stack(self, batch):
        return Watching(super().stack(batch), self)

    def higher_order(self, role, wanted, batch):
        stack, names = super().higher_order(role, wanted, batch)
        return Watching(stack, self), names

    def score(self, role, wanted, batch):
        found = super().score(role, wanted, batch)
        return None if found is None else Watching(found, self)

    def differentiable_base(self, batch):
        return Watching(super().differentiable_base(batch), self)

    def reward(self, name):
        reward = super().reward(name)

        def counted(x):
            self.rewarded += len(x)
            return reward(x)

        return counted


def watched(**table):
    backend = build({"problems": ["ring8"], "steps": STEPS, **table}, file="f", seed=0, device=DEVICE)
    (name,) = backend.problems
    return Watched(backend.problems[name], backend.settings, name)


def sampled(name, case, wanted=UNEQUAL):
    return METHODS[name](case, wanted, Draws(0, "", range(BATCH)), **SMALL.get(name, {}))


SOUPS = {"soup", "soup-factors"}


@pytest.mark.rng_untouched
@pytest.mark.parametrize("name", [name for name in METHODS if name not in SOUPS])
def test_costs_are_what_is_evaluated_and_noise_is_shared(name):
    case, wanted = watched(), Preference({"right": 1.0, "up": 0.0}) if name == "kla" else UNEQUAL
    drawn = sampled(name, case, wanted)
    assert case.evaluations == drawn.model_calls * BATCH
    # r(w) has as many parts as there are weights, and is counted once.
    assert case.rewarded == drawn.reward_calls * BATCH * 2
    if name.startswith("guidance"):
        assert drawn.gradient_calls == drawn.model_calls
    start = Draws(0, "", range(BATCH)).start(case.like, case.schedule.prior_std())
    seen = torch.cat(case.starts)
    assert bool((seen[:, None] == start).all(-1).any(0).all())
    assert len(drawn.samples) == BATCH and (drawn.log_weights is None or len(drawn.log_weights) == BATCH)
    again = sampled(name, watched(), wanted)
    assert torch.equal(again.samples, drawn.samples)


def test_methods_that_must_agree_do():
    corner, case = Preference({"right": 0.0, "up": 1.0}), watched()
    exact = sampled("exact", case, corner).samples
    # A corner is a member: blending, picking and tuning for it are the same, on the same noise.
    for name in ("mpa", "kla", "ls-systematic", "ls-independent", "pairwise", "quadratic", "composite", "over-time",
                 "union"):  # fmt: skip
        torch.testing.assert_close(sampled(name, case, corner).samples, exact, rtol=1e-3, atol=1e-3)
    apart = sampled("mpa", case, UNEQUAL).samples - sampled("exact", case, UNEQUAL).samples
    assert float(apart.abs().mean()) > 0.01
    base = sampled("base", case).samples
    torch.testing.assert_close(sampled("mpa", case, Preference(UNEQUAL.weights, 0.0)).samples, base)
    unguided = sampled("guidance", case, Preference(UNEQUAL.weights, 0.0)).samples
    torch.testing.assert_close(unguided, base, rtol=1e-3, atol=1e-3)


def test_switch_takes_members_in_turn():
    for count in (2, 3, 5):
        even = torch.full((count,), 1 / count, dtype=torch.float64)
        chosen = select_members(even, 4 * count, 50, "systematic", generator(0))
        windows = chosen.unfold(0, count, 1).sort(-1).values
        assert bool((windows == torch.arange(count)).all())


@pytest.mark.parametrize(
    ("name", "wanted", "reason"),
    [
        ("soup", UNEQUAL, "members that are networks"),
        ("kla", UNEQUAL, "one member"),
        ("ls-shared", Preference(UNEQUAL.weights, 2.0), "probabilities"),
        ("pairwise", Preference(UNEQUAL.weights, 2.0), "strength 1"),
        ("union", Preference(UNEQUAL.weights, 0.5), "tuned at"),
        ("union", Preference({"right": 2.0, "up": -1.0}), "not negative"),
        ("composite", Preference({"right": 0.0, "up": 0.0}), "a weight other than 0"),
        ("guidance", Preference({"right": 0.0, "up": 0.0}), "a weight other than 0"),
    ],
)
def test_a_method_says_why_it_does_not_apply(name, wanted, reason):
    with pytest.raises(NotApplicable, match=reason):
        sampled(name, watched(), wanted)


def test_a_correction_needs_noise():
    with pytest.raises(NotApplicable, match="noise"):
        sampled("mpa-corrected", watched(solver="dpm-2m"))
    with pytest.raises(NotApplicable, match="a solver that has some"):
        sampled("union", watched(solver="dpm-2m"))
    assert sampled("mpa", watched(solver="dpm-2m")).facts == {}


def test_every_method_names_its_source_and_cost():
    for name, method in METHODS.items():
        assert method.source and method.cost and method.label, name


def test_distances_see_the_target_and_not_another():
    case, n = watched(), 2000
    target, other = case.target(UNEQUAL), case.target(Preference({"right": 0.5, "up": 0.5}))
    for law, near in ((target, True), (other, False)):
        drawn = sampled("base", case)
        drawn = type(drawn)(law.sample(n, generator=generator(1)), 0)
        for name, distance in case.measure(drawn, UNEQUAL).items():
            assert (abs(distance.value - distance.floor) < 5 * distance.floor_sd) == near, name


def test_weighted_distances_undo_their_weights():
    backend = build({"problems": ["line2"]}, file="f", seed=0, device=DEVICE)
    case, wanted = backend.case("line2", ""), Preference({"right": 0.7, "left": 0.3})
    base = case.problem.base.sample(20_000, generator=generator(1))
    log_weights = case.problem.reward(wanted.weights)(base) / case.problem.kl_weight
    drawn = type(sampled("base", watched()))(base, 0, log_weights=log_weights)
    plain = type(drawn)(base, 0)
    weighed, unweighed = (case.measure(d, wanted) for d in (drawn, plain))
    assert set(weighed) == {"mode TV", "sliced W2", "KL"}
    for name in weighed:
        assert weighed[name].value < unweighed[name].value / 4, name


def test_the_union_has_another_law_and_says_so():
    case, wanted = watched(kl_weights=[0.5], steps=50), UNEQUAL
    drawn = METHODS["union"](case, wanted, Draws(0, "", range(4000)))
    x = case.problem.base.sample(400_000, generator=generator(1))
    values = {name: reward(x) for name, reward in case.problem.rewards.items()}
    weights = sum(w * (values[name] / case.kl_weight).exp() for name, w in wanted.weights.items())
    weights = weights / weights.sum()
    for name, found in case.rewards(drawn.samples).items():
        # p_base sum_i w_i exp(r_i / alpha), and not the target that its distances are taken to.
        error = float(found.std()) / 4000**0.5
        assert abs(float(found.mean() - weights @ values[name])) < 5 * error
        assert abs(float(found.mean()) - case.expected(wanted)[name]) > 5 * error
    assert not METHODS["union"].aims
    far = case.measure(drawn, wanted)["sliced W2"]
    assert far.value > far.floor + 5 * far.floor_sd


def test_the_reward_of_das_is_split_and_its_target_kept():
    # Base and target of the closed forms; the base rewards that are printed, -10.40 and -9.15, are not these.
    for name, base, target in (("das-grid", -11.08, -0.29), ("das-ring", -9.23, -1.34)):
        case = build({"problems": [name]}, file="f", seed=0, device=DEVICE).case(name, "")
        reward = case.problem.reported["r"]
        assert case.problem.base.mean_reward(reward) == pytest.approx(base, abs=0.005)
        assert case.target(Preference({"x": 0.5, "y": 0.5})).mean_reward(reward) == pytest.approx(target, abs=0.01)
        x = torch.randn(5, 2, generator=generator(0), dtype=torch.float64)
        values = case.rewards(x)
        torch.testing.assert_close(values["x"] + values["y"], values["r"])


def test_the_exact_targets_means_are_those_of_its_samples():
    case = watched()
    found, drawn = case.expected(UNEQUAL), case.target(UNEQUAL).sample(40_000, generator=generator(3))
    for name, values in case.rewards(drawn).items():
        assert abs(found[name] - float(values.mean())) < 5 * float(values.std()) / 200
    wrong = case.expected(Preference({"right": 0.3, "up": 0.7}))
    assert abs(wrong["up"] - found["up"]) > 0.1


def test_moved_is_the_distance_to_the_base_on_the_same_noise():
    case, draws = watched(), Draws(0, "", range(BATCH))
    base, blend = sampled("base", case), sampled("mpa", case)
    assert case.describe(base, draws)["moved"] == 0
    by_hand = (blend.samples - base.samples).square().mean(1).sqrt().mean()
    assert case.describe(blend, draws)["moved"] == pytest.approx(float(by_hand), rel=1e-6) and by_hand > 0.1
    others = Draws(0, "", range(BATCH, 2 * BATCH))
    assert case.describe(base, others)["moved"] > 1  # other noise is not the same pair


def test_moved_sets_a_resampled_sample_against_the_start_it_descends_from():
    case, draws = watched(), Draws(0, "", range(BATCH))
    base = sampled("base", case).samples
    ancestors = torch.arange(BATCH).div(3, rounding_mode="floor")
    log_weights = torch.randn(BATCH, generator=generator(1), dtype=torch.float64)
    shift = torch.linspace(0, 1, BATCH).unsqueeze(1)
    found = case.describe(Drawn(base[ancestors] + shift, 0, log_weights=log_weights, ancestors=ancestors), draws)
    assert found["moved"] == pytest.approx(float(log_weights.softmax(0) @ shift[:, 0].double()), rel=1e-5)
    for name in ("code", "best-of-n"):
        assert case.describe(sampled(name, case), draws) == {}
    for name in ("mpa-corrected", "steer-difference"):
        assert case.describe(sampled(name, case), draws)["moved"] > 0


CONFIG = """
[backend]
kind = "mixture"
problems = ["ring8"]
steps = 6
[grid]
methods = ["mpa", "code", "best-of-n", "steer-difference", "guidance"]
seeds = 20
[methods.code]
candidates = 3
[methods.best-of-n]
candidates = 3
[methods.guidance]
gamma = 0.1
[methods.steer-difference]
threshold = 0.7
"""


def plan_of(tmp_path, text=CONFIG):
    file = tmp_path / "c.toml"
    file.write_text(text)
    return load_plan(file)


def heads(path):
    cells = [Folder(path).read(key).record for key in Folder(path).stored()]
    return {record.method: record for record in cells}


def test_a_reward_that_raises_costs_the_methods_that_ask_it_alone(tmp_path, monkeypatch):
    def broken(x):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(MixtureCase, "reward", lambda self, name: broken)
    plan = plan_of(tmp_path)
    for resume in (False, True):
        notes = evaluate(plan, Folder(tmp_path / "out"), world=Processes(), resume=resume)
        said = [f"{name} on ring8: RuntimeError: out of memory" for name in plan.grid.methods[1:]]
        assert notes == ([] if resume else said)
    found = heads(tmp_path / "out")
    assert len(found) == 5 and not found["mpa"].failed
    assert {found[name].failed for name in plan.grid.methods[1:]} == {"RuntimeError: out of memory"}


def test_no_method_is_charged_for_random_numbers(tmp_path, slow_draws):
    evaluate(plan_of(tmp_path), Folder(tmp_path / "out"), world=Processes())
    assert slow_draws[0] > 10 and {record.seconds for record in heads(tmp_path / "out").values()} == {0.0}


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("[methods.code]\ncandidates = 3", "[methods.code]\ncandidates = 1", ["[methods.code] candidates", "2, got 1"]),
        ("[methods.code]", "[methods.code]\nblock = 0", ["[methods.code] block must be an integer of at least 1, got"]),
        ("[methods.best-of-n]\ncandidates = 3", "[methods.best-of-n]\ncandidates = 0", ["best-of-n] candidates"]),
        ("threshold = 0.7", "every = 0", ["[methods.steer-difference] every must be an integer of at least 1, got 0"]),
        ("threshold = 0.7", "threshold = 1.5", ["threshold must be a finite number above 0 and at most 1, got 1.5"]),
        ("gamma = 0.1", "gamma = -0.1", ["[methods.guidance] gamma must be a finite number of at least 0", "-0.1"]),
        ("gamma = 0.1", "scale = -1.0", ["[methods.guidance] scale must be a finite number of at least 0", "-1"]),
    ],
)
def test_options_that_cannot_serve_are_refused_before_anything_runs(tmp_path, old, new, parts):
    assert old in CONFIG
    refuses(lambda: plan_of(tmp_path, CONFIG.replace(old, new)), "c.toml", *parts)


def test_every_option_has_its_values_checked():
    keys = {key.name: key for method in METHODS.values() for key in describe(method.options)}
    assert set(keys) == {
        "candidates", "block", "every", "threshold", "tempering", "scale", "gamma", "moves", "step_size", "placing",
        "pilot",
    }  # fmt: skip
    assert all(key.description and re.search(r"at least|above|uniform", key.kind) for key in keys.values())


def test_accelerates_entry_tells_what_the_command_tells(monkeypatch, capsys):
    def diverges(argv):
        raise FloatingPointError("the state must stay finite")

    monkeypatch.setattr("sdeblend.evaluate.command.main", diverges)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sdeblend.evaluate", run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err == "sdeblend evaluate: the state must stay finite\n"
