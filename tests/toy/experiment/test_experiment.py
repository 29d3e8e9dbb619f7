"""An experiment: what it reports, that its methods are paired, and that its errors are those of repeated runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from toy.experiment import Experiment, run
from toy.experiment.prepared import prepare
from toy.experiment.settings import USUAL, BlendSettings
from toy.problems import gaussian_linear, line2, ring8

EVEN = (0.5, 0.5)
TARGET_KEYS = {"component_weights", "mean", "covariance", "mean_reward", "log_normalizer"}
METHOD_KEYS = {
    "component_weights", "component_weights_se", "mean", "mean_se", "covariance", "covariance_se", "mean_reward",
    "mean_reward_se", "mode_weight_tv", "mode_weight_tv_se", "mode_weight_tv_floor", "sliced_w2", "sliced_w2_floor",
    "certificate", "certificate_se", "certificate_note", "ess_fraction", "log_normalizer_estimate",
    "log_normalizer_estimate_se", "log_normalizer_closed_form", "score_evaluations", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def ring() -> Experiment:
    return run(ring8(), BlendSettings(weights=EVEN, samples=5000))


def deviations(report: dict[str, Any], method: str, key: str) -> torch.Tensor:
    """Return (measured - exact) / standard error of a vector."""
    row = report["methods"][method]
    measured, exact, error = (torch.tensor(v) for v in (row[key], report["target"][key], row[f"{key}_se"]))
    return (measured - exact) / error


def test_report_has_the_promised_keys_and_is_json(ring: Experiment) -> None:
    assert set(ring.report) == {"target", "methods"}
    assert set(ring.report["target"]) == TARGET_KEYS
    assert list(ring.report["methods"]) == list(USUAL)
    for row in ring.report["methods"].values():
        assert set(row) == METHOD_KEYS
    assert json.loads(json.dumps(ring.report, allow_nan=False)) == ring.report


def test_target_is_the_closed_form(ring: Experiment) -> None:
    problem = line2()
    experiment = run(problem, BlendSettings(weights=EVEN, strength=1.5, methods=["mpa"], samples=10, steps=2))
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)[:, None]
    wanted = problem.base.log_prob(x) + 1.5 * sum(0.5 * r(x) for r in problem.rewards.values()) / problem.kl_weight
    known = float(torch.trapezoid(wanted.exp(), x[:, 0]).log())
    assert experiment.report["target"]["log_normalizer"] == pytest.approx(known, rel=1e-10)
    weights = [r * 1.5 * 0.5 for r in (1, 1)]
    c = experiment.preference.coefficients(problem.names)
    assert c.tolist() == pytest.approx([1 - sum(weights), *weights])
    assert ring.report["target"]["mean"] == ring.target.mean.tolist()


def test_ring_reaches_its_reference_points(ring: Experiment) -> None:
    rows = ring.report["methods"]
    assert rows["mpa"]["mode_weight_tv"] == pytest.approx(0.078, abs=0.02)
    for method in ("exact", "mpa-corrected"):
        assert rows[method]["mode_weight_tv"] < 0.02
        assert rows["mpa"]["sliced_w2"] > 1.4 * rows[method]["sliced_w2"]
    for method in ("mpa", "mpa-corrected"):
        assert rows[method]["log_normalizer_closed_form"] == pytest.approx(-1.246, abs=5e-4)
        assert rows[method]["log_normalizer_estimate"] == pytest.approx(-1.246, abs=0.05)


def test_exact_score_is_unbiased_and_the_blend_is_seen_to_be_biased(ring: Experiment) -> None:
    # At 200 steps the solver's own error is below the sampling error of the heavier modes.
    assert deviations(ring.report, "exact", "component_weights")[:3].abs().max() < 5
    assert deviations(ring.report, "mpa", "component_weights")[:3].abs().max() > 10


def test_methods_without_a_certificate_say_why(ring: Experiment) -> None:
    rows = ring.report["methods"]
    for method in ("exact", "ls", "ls-iid", "ls-shared"):
        assert rows[method]["certificate"] is None
        assert rows[method]["certificate_note"]
    assert 0.05 < rows["mpa"]["certificate"] < 0.3
    assert 0.5 < rows["mpa"]["ess_fraction"] < 1


def test_evaluations_count_members(ring: Experiment) -> None:
    counts = {name: row["score_evaluations"] for name, row in ring.report["methods"].items()}
    assert counts == {"exact": 200, "mpa": 400, "mpa-corrected": 400, "ls": 200, "ls-iid": 200, "ls-shared": 200}
    # A strength of one half makes the base count too; Heun evaluates twice, but for the step to 0.
    experiment = run(ring8(), BlendSettings(weights=EVEN, strength=0.5, solver="heun", steps=5, samples=10))
    assert experiment.report["methods"]["mpa"]["score_evaluations"] == 3 * 9


def test_methods_share_start_and_step_noise() -> None:
    # On one Gaussian with linear rewards the blend is exact: on the same noise it is the control, sample by sample.
    settings = BlendSettings(weights=EVEN, samples=500, steps=40, methods=["exact", "mpa"])
    samples = run(gaussian_linear(), settings).samples
    torch.testing.assert_close(samples["mpa"].samples, samples["exact"].samples, rtol=1e-4, atol=1e-4)
    other = run(gaussian_linear(), settings.changed(seed=1)).samples
    assert float((other["mpa"].samples - samples["exact"].samples).abs().mean()) > 0.3


def test_one_member_a_step_follows_the_blend_on_its_noise(ring: Experiment) -> None:
    def gap(method: str) -> float:
        return float((ring.samples[method].samples - ring.samples["mpa"].samples).norm(dim=1).mean())

    unpaired = ring.samples["ls"].samples[torch.arange(5000).roll(1)] - ring.samples["mpa"].samples
    assert gap("ls") < gap("ls-iid") < float(unpaired.norm(dim=1).mean()) / 2


@pytest.mark.rng_untouched
def test_a_seed_gives_the_same_run_whatever_else_is_run() -> None:
    settings = BlendSettings(weights=EVEN, samples=100, steps=20)
    everything, alone = run(line2(), settings), run(line2(), settings.changed(methods=["mpa-corrected"]))
    assert torch.equal(everything.samples["mpa-corrected"].samples, alone.samples["mpa-corrected"].samples)
    rows = [experiment.report["methods"]["mpa-corrected"] | {"seconds": 0} for experiment in (everything, alone)]
    assert rows[0] == rows[1]
    other = run(line2(), settings.changed(seed=1))
    assert not torch.equal(everything.samples["exact"].samples, other.samples["exact"].samples)


def test_errors_after_resampling_are_those_of_repeated_runs() -> None:
    settings = BlendSettings(weights=EVEN, samples=500, steps=60, methods=["mpa-corrected"])
    experiments = [run(line2(0.1), settings.changed(seed=seed)) for seed in range(20)]
    rows = [experiment.report["methods"]["mpa-corrected"] for experiment in experiments]
    spread = float(torch.tensor([row["mean"][0] for row in rows]).std())
    told = float(torch.tensor([row["mean_se"][0] for row in rows]).square().mean().sqrt())
    assert 0.5 < told / spread < 2
    # Control: taking resampled samples as independent promises too much.
    sampled = [experiment.samples["mpa-corrected"] for experiment in experiments]
    assert all(one.ancestors is not None and one.log_weights is not None for one in sampled)
    shares = [one.log_weights.softmax(0) for one in sampled]  # type: ignore[union-attr]
    naive = [
        float((w * (one.samples[:, 0] - w @ one.samples[:, 0].double())).norm())
        for w, one in zip(shares, sampled, strict=True)
    ]
    assert sum(naive) / len(naive) / spread < 0.4


def test_what_applies_depends_on_solver_and_coefficients() -> None:
    small = BlendSettings(weights=EVEN, samples=50, steps=10)
    without_noise = prepare(line2(), small.changed(solver="dpm-2m")).methods
    assert list(without_noise) == ["exact", "mpa", "ls", "ls-iid", "ls-shared"]
    assert list(prepare(line2(), small.changed(strength=1.2)).methods) == ["exact", "mpa", "mpa-corrected"]
    row = run(line2(), small.changed(solver="dpm-2m", methods=["mpa"])).report["methods"]["mpa"]
    assert row["certificate"] is None and row["log_normalizer_closed_form"] is None
    assert row["certificate_note"] == "a certificate needs a solver with noise"


def test_weights_can_be_named() -> None:
    named = prepare(ring8(), BlendSettings(weights={"up": 0.3}))
    assert named.preference.coefficients(named.problem.names).tolist() == pytest.approx([0.7, 0.0, 0.3])


def test_progress_counts_every_step_of_every_method() -> None:
    calls: list[tuple[str, int, int]] = []
    settings = BlendSettings(weights=EVEN, samples=10, steps=3, methods=["exact", "ls"])
    run(line2(), settings, progress=lambda *call: calls.append(call))
    assert calls == [(name, done, 3) for name in ("exact", "ls") for done in (1, 2, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "vp"}, "schedule must be one of 'vp-linear', .*, got 'vp'"),
        ({"solver": "euler"}, "solver must be one of .*, got 'euler'"),
        ({"methods": ["mpa", "mpc"]}, "methods must be a list of any of 'exact', .*, got 'mpc'"),
        ({"methods": ["mpa", "mpa"]}, "none twice"),
        ({"methods": []}, "methods must be a list of .* at least 1, got"),
        ({"steps": 1}, "steps must be an integer from 2 to 10000, got 1"),
        ({"samples": True}, "samples must be an integer from 10 to 10000000, got true"),
        ({"seed": -1}, "seed must be an integer from 0 to 2\\^63 - 1, got -1"),
    ],
)
def test_settings_refuse_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlendSettings(weights=EVEN, **changes)
