# %% [markdown]
# # Strength
#
# One model has been fine-tuned for one reward at KL weight $\alpha$, and it does too much, or too little. The model
# that was wanted, the one tuned at $\alpha/\lambda$, is
#
# $$ p_\lambda(x) = p_{\mathrm{pre}}(x)\, e^{\lambda r(x)/\alpha} / Z_\lambda , $$
#
# and **DB-KLA** (Algorithm 2 of *Diffusion Blend*, arXiv 2505.18547) approximates it without training, by blending
# base and fine-tuned model:
#
# $$ S^{(\lambda)}_t \;\approx\; (1 - \lambda)\, S^{\mathrm{pre}}_t + \lambda\, S^{(r,\alpha)}_t . $$
#
# $\lambda = 0$ is the base, 1 the fine-tuned model, between them one interpolates. Above 1 one extrapolates, with a
# negative coefficient on the base. (Classifier-free guidance is the same formula.) This notebook turns $\lambda$ from
# 0 to 3 on a problem on the line, with the exact target and the exact-score control beside every blend.

# %%
"""Strength: DB-KLA from 0 to 3, what it over- and undershoots, its certificate, and what a second checkpoint buys."""

import math
import os

import torch
from IPython.display import Image, display

from sdeblend import BackwardSDE, Blend, Preference, VPLinear, solve, time_grid
from toy import MixtureStack, Problem, QuadraticReward, metrics, mixture_score, problems
from toy.experiment import BlendSettings, run
from toy.plotting import encoded, panels, style_of
from toy.plotting.curves import CERTIFICATE, certified, curve, family_style, label, legend_below, measured
from toy.plotting.line import histograms_figure, line_states, rms, strengths_figure

FAST = os.environ.get("SDEBLEND_FAST") == "1"  # the tests run a short version
SAMPLES = 1_000 if FAST else 20_000
print("fast mode: few samples, rough numbers" if FAST else f"{SAMPLES} samples a run")

schedule = VPLinear()
both = problems.line2(kl_weight=0.5)
problem = Problem("line2, one reward", both.base, {"right": both.rewards["right"]}, both.kl_weight)
base, right = problem.base, problem.rewards["right"]


def show(figure):
    """Display a figure as PNG."""
    display(Image(encoded(figure, dpi=90)))


# %% [markdown]
# ## The targets
#
# **What would falsify the next figure:** samples of the base, reweighted by $e^{\lambda r/\alpha}$, are another way
# to the mean reward of each target. A ring whose whiskers (two standard errors) miss the black line by far would
# falsify the closed forms. (At high strength few of the base's samples have any weight, so whiskers grow: reweighting
# the base is no sampler.)

# %%
x = base.sample(20 * SAMPLES, generator=torch.Generator().manual_seed(1))
strengths = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
found = {s: metrics.mean_reward(x, right, log_weights=s * right(x) / problem.kl_weight) for s in strengths}
show(strengths_figure(problem, "right", (0.0, 0.5, 1.0, 2.0, 3.0), found))

for strength, estimate in found.items():
    target = problem.target({"right": 1.0}, strength)
    off = (estimate.value - target.mean_reward(right)) / estimate.se
    drift = base.tilt_kl(right * strength, kl_weight=problem.kl_weight)
    earned = f"mean reward {target.mean_reward(right):+.3f} (reweighted base off by {off:+.1f} se)"
    print(f"strength {strength:<4g}: {earned}, {drift:.2f} nats from the base")

# %% [markdown]
# ## The blend
#
# Coefficients may differ from sample to sample, so one batch can sweep all strengths, and each has its own
# certificate (see notebook `01`): an upper bound, in nats, on the KL divergence of the blend from its target.

# %%
count = SAMPLES // 10
preference = Preference({"right": 1.0}, strength=torch.tensor(strengths).repeat_interleave(count))
noise = torch.Generator().manual_seed(0)
start = schedule.prior((count * len(strengths), 1), generator=noise)
blend = Blend(problem.stack(schedule), preference)
solution = solve(BackwardSDE(schedule, blend), start, time_grid(schedule, 200), noise=noise, correct="certify")
for (of_base, of_member), certificate in zip(blend.coefficients[::count].tolist(), solution.certificates, strict=True):
    print(f"{of_base:+.2f} base {of_member:+.2f} member: {certificate}")

# %% [markdown]
# ## Samples
#
# In all figures the blend is labelled DB-MPA: DB-KLA is the same blend with one member and a strength.
#
# **What would falsify the claim that DB-KLA misses its target between and beyond 0 and 1:** blue histograms on the
# black lines, or light-blue ones (the control: exact score, same grid, step and noise) off them. **And the
# correction:** green ones off.

# %%
methods = ("exact", "mpa", "mpa-corrected")


def at(strength, samples):
    """Return the outcome of all methods at one strength."""
    return run(problem, BlendSettings(weights={"right": 1.0}, strength=strength, methods=methods, samples=samples))


show(histograms_figure({f"λ = {strength:g}": at(strength, SAMPLES) for strength in (0.5, 2.0, 3.0)}, methods))

# %% [markdown]
# ## Undershoot and overshoot
#
# The blend is exact at $\lambda = 0$ and $1$, where it is a single model. Between, a blend of logarithms of means
# falls short of the wanted one; beyond, the same convexity makes it go too far.
#
# **What would falsify the next figure:** a blue line in the right panel above zero between 0 and 1, or below zero
# beyond 1; a blue line away from the control at 0 or 1; or a control away from zero by more than its band and a small
# error of the solver, the same at all strengths.

# %%
knob = [0.0, 0.5, 1.0, 2.0] if FAST else [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0]
swept = [at(strength, SAMPLES // 2) for strength in knob]
figure, (left, right_side) = panels(2, width=5.2)
measured(left, knob, swept, "mean_reward/right", methods)
label(left, "mean reward", "strength λ", "mean reward (base sd)")
measured(right_side, knob, swept, "mean_reward/right", methods, excess=True)
label(right_side, "mean reward less the target's", "strength λ", "excess (base sd)")
legend_below(figure, columns=5, note="bands are two standard errors")
show(figure)

for strength, o in zip(knob, swept, strict=True):
    wanted = o.report["target"]["mean_reward"]["right"]
    excess = ", ".join(f"{m} {o.report['methods'][m]['mean_reward']['right'] - wanted:+.3f}" for m in methods)
    print(f"strength {strength:<4g}: mean reward less the target's: {excess}")

# %% [markdown]
# ## The certificate and the correction beyond 1
#
# A negative coefficient has a price. With coefficients in $[0, 1]$ the weights of the correction are at most one;
# with a negative one they have heavy tails, a few samples carry most of the weight, and the correction is **best
# effort**.
#
# **What would falsify the next figure:** a KL divergence of the mode weights above the certificate by more than the
# control's; a certificate above zero at strengths 0 or 1; or an estimate of $\log \mathrm{E}[W]$ that misses its
# closed form (rings off the black line) while the effective share of samples is high.

# %%
rows = [o.report["methods"]["mpa-corrected"] for o in swept]
figure, (left, middle, last) = panels(3, width=4.4)
certified(left, knob, swept)
label(left, "the bound and what it bounds", "strength λ", "nats")
measured(middle, knob, swept, "ess_fraction", ("mpa",))
label(middle, "effective share of the samples", "strength λ", "share without resampling", ylim=(0, 1.05))
curve(last, knob, [row["log_normalizer_closed_form"] for row in rows], style_of("target"))
values, errors = ([row[f"log_normalizer_estimate{end}"] for row in rows] for end in ("", "_se"))
whiskers = [2 * error for error in errors]
last.errorbar(knob, values, whiskers, fmt="o", mfc="none", color=CERTIFICATE.colour, label="estimated")
label(last, "log of the mean weight", "strength λ", "log E[W] (nats)")
legend_below(figure, columns=4, note="bands and whiskers are two standard errors")
show(figure)

for strength, row, o in zip(knob, rows, swept, strict=True):
    known, kept = row["log_normalizer_closed_form"], o.report["methods"]["mpa"]["ess_fraction"]
    estimate = f"{row['log_normalizer_estimate']:+.3f} +- {row['log_normalizer_estimate_se']:.3f}"
    print(f"strength {strength:<4g}: log E[W] {estimate}, closed form {known:+.3f}, effective samples {kept:.0%}")

# %% [markdown]
# ## What a second checkpoint buys
#
# The exact score at strength $\lambda$ is a smooth function of $\lambda$, and DB-KLA is its linear interpolation
# between 0 and 1. With a checkpoint at strength $1/2$ as well (tuned at KL weight $2\alpha$, or kept from the same
# training) one can interpolate quadratically: Lagrange's coefficients sum to one too, so `Blend` takes them.
#
# **What would falsify the next figure:** an error of the quadratic blend above that of the linear one for $\lambda$
# in $[0, 1]$. (Beyond 1 nothing is promised, and at small $\alpha$ it is worse.) Here nothing is sampled: the error
# is the distance of the blended score from the exact one at $t = 0.2$, over the states that the base visits.

# %%
states, t = line_states(), torch.tensor(0.2, dtype=torch.float64)


def lagrange(strength, nodes):
    """Return Lagrange's coefficients for checkpoints at the strengths ``nodes``; they sum to one."""
    pairs = [[(n, m) for m in nodes if m != n] for n in nodes]
    return [math.prod((strength - m) / (n - m) for n, m in others) for others in pairs]


def score_error(problem, strength, nodes):
    """Return the rms error of the score that is interpolated between checkpoints."""
    laws = [problem.target({"right": 1.0}, node) for node in nodes]
    exact = mixture_score(problem.target({"right": 1.0}, strength), schedule)(states, t)
    blended = Blend(MixtureStack(laws, schedule), lagrange(strength, nodes))(states, t)
    return rms(problem.base.noised(schedule, t), states, exact - blended)


kinds = {"linear, checkpoints at 0 and 1": (0.0, 1.0), "quadratic, at 0, 1/2 and 1": (0.0, 0.5, 1.0)}
fine = [i / 20 for i in range(61)]
figure, grid = panels(2, width=5.2)
for axes, alpha in zip(grid, (1.0, 0.25), strict=True):
    tuned = problem.with_kl_weight(alpha)
    found = [[score_error(tuned, strength, nodes) for strength in fine] for nodes in kinds.values()]
    for i, (kind, errors) in enumerate(zip(kinds, found, strict=True)):
        curve(axes, fine, errors, family_style(i, kind))
    label(axes, f"α = {alpha:g}", "strength λ", "rms error of the score", yscale="log", ylim=(1e-4, 100))
    gains = [f"{fine[i]:g}: {found[0][i] / found[1][i]:.2f}" for i in (5, 15, 25, 30, 60)]
    print(f"alpha {alpha:g}: error of linear over quadratic, at strength", ", ".join(gains))
legend_below(figure)
show(figure)

# %% [markdown]
# ## Where there is no target
#
# A reward that grows like $x^2$ can outrun a Gaussian's tail: then $e^{\lambda r/\alpha}\,p_{\mathrm{pre}}$ has no
# finite mass from some strength on. A blend of networks would still produce images. Where the laws are known, the
# library says so:

# %%
outward = Problem("outward", base, {"outward": QuadraticReward(quadratic=[[-1.0]])}, problem.kl_weight)
for strength in (0.5, 1.0, 3.0):
    try:
        print(f"strength {strength:g}: variance {float(outward.target({'outward': 1.0}, strength).covariance):.3f}")
    except ValueError as error:
        print(f"strength {strength:g}: {error}")

# %% [markdown]
# ## What to remember
#
# * Strength is a knob that needs no training, exact at 0 and 1, too weak between and too strong beyond.
# * Inside $[0, 1]$ the correction is cheap and exact. Beyond 1 the effective share of samples falls fast; read it
#   before trusting a corrected sample.
# * A checkpoint at half strength removes most of the uncorrected error inside $[0, 1]$, and may add to it beyond.
