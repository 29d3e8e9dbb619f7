# %% [markdown]
# # One adapter a step
#
# A blend of $m$ fine-tuned models evaluates all of them in every step: with $m$ LoRA adapters on one network, an image
# costs $m$ times as much. **DB-MPA-LS** draws *one* adapter a step, adapter $i$ with its preference weight $w_i$, and
# lets it step alone. *Diffusion Blend* (arXiv 2505.18547, Proposition 2) says that this reaches the law of the full
# blend as the steps get shorter. Why it may work, in one line:
#
# $$\mathbb E_I\,[S_I(x)] = \sum_i w_i S_i(x), \qquad
# \mathrm{Cov}(x_{t-h}\mid x_t) = h g^2\,\mathbb 1 + \underbrace{h^2 g^4\,\mathrm{Var}_w(S_i)}_{\text{what the draw
# adds}}.$$
#
# The mean is the blend's; what the draw adds is of order $h^2$ a step, of order $h$ a run. This notebook looks at that
# step, at three ways to draw the adapters, at the rates, and at what the draw costs. Everything happens on a mixture of
# eight Gaussians, where the exact target of a preference is known in closed form. Black is always that target, and
# every blend has a **control** beside it: the exact target's own score on the same grid, step and noise.

# %%
"""One adapter a step: three ways to draw it, how fast the law of the blend is reached, and what the draw costs."""

import os

import numpy as np
import torch
from IPython.display import Image, display

from proofs_checks.harness.draw import Drawn
from proofs_checks.proposition_2 import line_distances
from sdeblend import STEPS, BackwardSDE, Blend, OneMemberPerStep, Preference, VPLinear, solve, time_grid
from toy import MixtureStack, mixture_score, problems
from toy.metrics import mode_weights, sliced_w2, sliced_w2_floor
from toy.plotting import OKABE_ITO, Style, encoded, panels, style_of
from toy.plotting.curves import FLOOR, curve, label, legend_below
from toy.plotting.one_member import batches_figure, one_step_figure, sequence_figure
from toy.statements.one_member import covariance_error, extra_variance, one_step

FAST = os.environ.get("SDEBLEND_FAST") == "1"
SAMPLES = 1_000 if FAST else 20_000
problem, schedule = problems.ring8(kl_weight=0.25), VPLinear()
weights = torch.tensor([0.6, 0.4], dtype=torch.float64)  # of the members tuned for "right" and for "up"
members, target = problem.members(), problem.target(weights.tolist())
stack = MixtureStack(members, schedule)
control, blend = mixture_score(target, schedule), Blend(stack, weights)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def show(figure):
    """Display a figure as PNG."""
    display(Image(encoded(figure, dpi=90)))


# %% [markdown]
# ## One step from one point
#
# Take one point between the modes, at a time when the two adapters disagree about it, and step from there a few
# thousand times, each time with the adapter that was drawn. Distances are in units of the noise that the step adds
# anyway, so the blend's own covariance is the unit circle (drawn at two standard deviations).
#
# **It would be wrong if** the measured ellipse (dotted) left the predicted one (dashed), or if the cloud's centre left
# the square, or if the ellipse did not close in on the circle as $h$ falls.

# %%
point, time = torch.tensor([1.2, 0.0]), 0.3
clouds = [
    one_step(members, weights, target, schedule, point, time, h, count=SAMPLES // 2, generator=seeded(1))
    for h in (0.2, 0.05, 0.0125)
]
for cloud in clouds:
    off = float(cloud.points.mean(0).norm()) * (len(cloud.points) / 2) ** 0.5
    extra = [float(c.trace() / 2 - 1) for c in (cloud.covariance, torch.cov(cloud.points.T))]
    print(f"h = {cloud.step:<7g} centre less the blend's: {off:.1f} standard errors;  variance added, in shares of the "
          f"step's own: {extra[0]:.3f} predicted, {extra[1]:.3f} measured (± {len(cloud.points) ** -0.5:.3f})")
show(one_step_figure(clouds, problem.names))

# %% [markdown]
# The centres of the two clouds move together like $\sqrt h$ in these units, so their variance is of order $h$. The
# black cross is the control: it is not at the square because the blend of the members' scores is *not* the target's
# score (notebook 02), however the members are drawn. One adapter a step approximates the blend, not the target.
#
# ## Three ways to draw
#
# * **one draw for the batch**: one adapter for all samples of a step. It is what the paper's code does, and cheapest
#   on a GPU;
# * **independent**: every sample draws its own adapter at every step;
# * **systematic**: every sample runs through a fixed sequence that spreads the adapters as evenly as possible
#   (Tijdeman's chairman assignment), from a random start. Same cost as independent draws.
#
# **It would be wrong if** a line of the systematic panel left the green band, where each adapter has been used within
# one of $n w_i$ times after $n$ steps, or if sample after sample had the same sequence.

# %%
WAYS = {"ls-shared": "shared", "ls-iid": "independent", "ls": "systematic"}


def one_member(name, steps, samples=SAMPLES, seed=3):
    grid = time_grid(schedule, steps)
    return OneMemberPerStep(stack, weights, grid, samples, method=WAYS[name], generator=seeded(seed))


indices = {way: one_member(name, 60, samples=64).index[:60] for name, way in WAYS.items()}
for way, index in indices.items():
    count = (index == 1).double().sum(0)
    print(f"{way:12s} uses of 'up' in 60 steps: {count.mean():5.1f} on average over samples, least {count.min():.0f}, "
          f"most {count.max():.0f}, wanted {60 * float(weights[1]):.0f}")
show(sequence_figure(indices, float(weights[1])))

# %% [markdown]
# ## What a batch gets
#
# With one draw for the batch all samples share their luck: a batch that happened to get 'up' too often is wrong as a
# whole, and more samples do not help. Below, every dot is a batch that differs from the others in nothing but the drawn
# adapters (same start, same noise), and shows which share of its samples is in one mode of the ring.
#
# **It would be wrong if** the dots of the systematic draws strayed from those of DB-MPA by more than the grey band
# (what the finite number of samples alone explains), or if those of the shared draws did not. That DB-MPA is itself off
# the black line is the blend's error; the control must lie in the band.

# %%
BATCHES, BATCH = 3 if FAST else 8, SAMPLES // 5


def run(score, steps, step="euler-maruyama", samples=SAMPLES):
    start, grid = schedule.prior((samples, 2), generator=seeded(1)), time_grid(schedule, steps)
    return solve(BackwardSDE(schedule, score), start, grid, step=STEPS[step](), noise=seeded(2)).samples.double()


def shares(score):
    return mode_weights(run(score, 100, samples=BATCH), target).value


drawn = {n: torch.stack([shares(one_member(n, 100, BATCH, seed)) for seed in range(BATCHES)]) for n in WAYS}
drawn = {"exact": shares(control)[None], "mpa": shares(blend)[None], **drawn}
for name, values in drawn.items():
    tv = (values - target.weights).abs().sum(1) / 2
    print(f"{style_of(name).label:24s} mode weights to the target's, TV {tv.min():.3f} to {tv.max():.3f}")
modes = [(0, "mode to the right"), (1, "mode in between"), (2, "mode above")]
error = float((target.weights * (1 - target.weights) / BATCH).max() ** 0.5)
show(batches_figure(drawn, target.weights, modes, error))

# %% [markdown]
# ## How fast
#
# How far from DB-MPA is one adapter a step, at the same number of steps $n$? Proposition 2 gives no rate. Measured:
# draws that differ from sample to sample leave a *bias* of order $1/n$; a shared draw errs by chance, of order
# $n^{-1/2}$. On the left whole laws are compared, on the line, where they can be computed by quadrature without a
# single sample (the check of Proposition 2 does the same on problems drawn anew). On the right, samples on the ring on
# the same noise; bands are two standard errors. For scale, the black line is what the step alone costs: the control
# against the exact target. The blue line is what DB-MPA misses of the target.
#
# **It would be wrong if**, on the left, independent and systematic draws did not become parallel to the dotted line; if
# on the right systematic draws were not at least five times below independent ones; or if the blue lines fell with the
# number of steps, because then the blend's error would be the step's.

# %%
counts = (16, 32, 64) if FAST else (25, 50, 100, 200)
line2 = Drawn(problems.line2(0.25), Preference({"right": 0.6, "left": 0.4}))
line = line_distances(line2, seeded(8), 4 if FAST else 48, counts)
for way in WAYS.values():
    order = -np.polyfit(np.log(counts[1:]), np.log(line[way][1:]), 1)[0]
    print(f"line, {way:12s} {', '.join(f'{v:.4f}' for v in line[way])} at {counts} steps; order {order:.2f}")
ring, ring_bars = {name: [] for name in ("exact", "mpa", *WAYS)}, {name: [] for name in WAYS}
for n in counts:
    full, small = run(blend, n), run(blend, n, samples=BATCH)
    for name, samples in (("exact", run(control, n)), ("mpa", full)):
        ring[name].append(float((torch.cov(samples.T) - target.covariance).norm()))
    errors = {name: covariance_error(run(one_member(name, n), n), full) for name in ("ls-iid", "ls")}
    batches = [run(one_member("ls-shared", n, BATCH, seed), n, samples=BATCH) for seed in range(BATCHES)]
    luck = torch.stack([(torch.cov(x.T) - torch.cov(small.T)).norm() for x in batches])
    for name, (value, se) in {**errors, "ls-shared": (luck.mean(), luck.std() / BATCHES**0.5)}.items():
        ring[name].append(float(value))
        ring_bars[name].append(float(se))
gains = [a / b for a, b in zip(ring["ls-iid"], ring["ls"], strict=True)]
print(f"ring, independent over systematic: {', '.join(f'{gain:.0f}' for gain in gains)} times at {counts} steps")

# %%
line |= {"ls-shared": line["shared"], "ls-iid": line["independent"], "ls": line["systematic"]}
line |= {"exact": line["control to target"], "mpa": line["blend to target"]}
blue = OKABE_ITO["blue"]
scale = {"exact": Style("black", "-", "control to exact target"), "mpa": Style(blue, "-", "DB-MPA to exact target")}
slope = Style(OKABE_ITO["grey"], ":", "order 1")
figure, (left, right) = panels(2, width=4.8, height=4.0)
for axes, values, bars in ((left, line, {}), (right, ring, ring_bars)):
    for name in ring:
        curve(axes, counts, values[name], scale.get(name, style_of(name)), se=bars.get(name), marker="o")
    curve(axes, counts, [1.6 * values["ls-iid"][-1] * counts[-1] / n for n in counts], slope)
    axes.set(xscale="log", yscale="log", ylim=(min(values["ls"]) / 2, 2 * max(values["ls-shared"])))
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
label(left, "line2, α = .25: laws by quadrature", "steps n", "total variation")
label(right, "ring8, α = .25: samples", "steps n", "covariance error (Frobenius norm), units of x²")
legend_below(figure, columns=3)
show(figure)

# %% [markdown]
# ## When the draw is expensive
#
# The extra variance of a step, in shares of the noise that the step adds anyway, is
# $h g^2\,\mathrm{tr}\,\mathrm{Var}_w(S_i)/d$. It is where the adapters disagree that a draw costs, and they disagree
# more the stronger they are tuned (small KL weight $\alpha$). The same spread of scores makes the blend itself inexact:
# summed over a run it is $-2\,\mathbb E[\log W]/d$, with $W$ the weights behind the certificate (notebook 01).
#
# **It would be wrong if** the curves did not fall with the number of steps and with the KL weight, or if their sum and
# $-2\,\mathbb E[\log W]/d$, which the solver accumulates on its own, differed by more than rounding.

# %%
figure, (axes,) = panels(1, width=7.0, height=3.8)
for alpha, colour in ((1.0, "sky"), (0.25, "blue"), (0.1, "vermillion")):
    part = Blend(MixtureStack(problem.with_kl_weight(alpha).members(), schedule), weights)
    for n, line in ((50, "-"), (200, "--")):
        grid, start = time_grid(schedule, n), schedule.prior((SAMPLES // 10, 2), generator=seeded(1))
        added = extra_variance(part, schedule, start, grid, generator=seeded(2))
        curve(axes, grid[: len(added.value)], added.value, Style(OKABE_ITO[colour], line, f"α = {alpha:g}, {n} steps"),
              se=added.se)
        spent = -solve(BackwardSDE(schedule, part), start, grid, noise=seeded(2), correct="certify").log_weights.mean()
        print(f"α = {alpha:<5g}{n:4d} steps: most {added.value.max():.3f} a step, sum {added.value.sum():.5f}, "
              f"−2 E[log W]/d = {spent:.5f}")
axes.axhline(0, color="black", linewidth=1.2, label="control: one exact score, nothing to draw")
label(axes, "what the draw adds", "time t (noise at 1, data at 0)", "extra variance, shares of\nthe step's own noise",
      xlim=(1, 0))
legend_below(figure, columns=3)
show(figure)

# %% [markdown]
# ## Is it worth it?
#
# Compared at equal *cost*, one adapter a step can take $m$ times as many steps as the blend. And compared at equal
# *steps* there is a trap: the ancestral step (DDIM with $\eta = 1$), used by most pipelines, makes samples that are too
# narrow at few steps, and the variance that the draw adds can hide that. The draw looks better than the blend it
# approximates, and even than the exact score.
#
# **It would be wrong if**, on the right, the curve of systematic draws were not DB-MPA's moved left by the factor
# $m = 2$ (same law, half the cost), better and better so as steps are added; if independent draws did not have more
# variance than both; or if at few steps they were not nearer to the black line than the control, which uses the exact
# score.

# %%
STEPS_TRIED = (12, 25, 50) if FAST else (12, 25, 50, 100, 200)
truth = target.sample(SAMPLES, generator=seeded(5))
costs, distances, kept = {}, {}, {}
for name in ("exact", "mpa", "ls-iid", "ls"):
    score = {"exact": control, "mpa": blend}.get(name)
    runs = [run(score or one_member(name, n), n, "ddim-ancestral") for n in STEPS_TRIED]
    costs[name] = [n * (2 if name == "mpa" else 1) for n in STEPS_TRIED]
    distances[name] = [sliced_w2(x, truth, generator=seeded(6)) for x in runs]
    kept[name] = [float(torch.cov(x.T).trace() / target.covariance.trace()) for x in runs]
    shown = "; ".join(f"{n} steps: {share:.3f}" for n, share in zip(STEPS_TRIED, kept[name], strict=True))
    print(f"{style_of(name).label:24s} variance over the target's at {shown}")
apart = [abs(a / b - 1) for a, b in zip(kept["ls"], kept["mpa"], strict=True)]
print("systematic draws and DB-MPA at equal steps: variances apart by", ", ".join(f"{100 * v:.1f} %" for v in apart))

# %%
figure, (left, right) = panels(2, width=4.8, height=3.8)
for name in costs:
    curve(left, costs[name], distances[name], style_of(name), marker="o")
    curve(right, costs[name], kept[name], style_of(name), marker="o")
floor = float(sliced_w2_floor(target, SAMPLES, generator=seeded(7)).value)
curve(left, [min(STEPS_TRIED), 2 * max(STEPS_TRIED)], [floor, floor], FLOOR)
curve(right, [min(STEPS_TRIED), 2 * max(STEPS_TRIED)], [1, 1], style_of("target"))
cost = "score evaluations a sample"
label(left, "distance to the exact target", cost, "sliced W2, units of x", xscale="log")
label(right, "total variance", cost, "shares of the exact target's", xscale="log")
for axes in (left, right):
    axes.set_xticks([*STEPS_TRIED, 2 * STEPS_TRIED[-1]], [str(n) for n in (*STEPS_TRIED, 2 * STEPS_TRIED[-1])])
    axes.minorticks_off()
legend_below(figure)
show(figure)

# %% [markdown]
# ## What a draw gives up
#
# The blend evaluates all adapters, so it knows how much they disagree: its certificate and correction come for nothing.
# One adapter a step never sees the others. And a negative coefficient (extrapolation, strength above 1) cannot be
# drawn. Both are refused rather than approximated:

# %%
start, grid = schedule.prior((10, 2), generator=seeded(1)), time_grid(schedule, 100)
for attempt in (
    lambda: solve(BackwardSDE(schedule, one_member("ls", 100, 10)), start, grid, noise=seeded(2), correct="certify"),
    lambda: OneMemberPerStep(problem.stack(schedule), Preference([0.6, 0.4], 1.5), grid, 10, generator=seeded(3)),
):
    try:
        attempt()
    except ValueError as error:
        print("refused:", error)
for name, score in (("DB-MPA", blend), ("one adapter a step", one_member("ls", 100, 10))):
    solution = solve(BackwardSDE(schedule, score), start, grid, noise=seeded(2))
    print(f"{name}: {solution.evaluations:.0f} evaluations a sample in 100 steps")

# %% [markdown]
# ## In short
#
# * One adapter a step costs one model instead of $m$, and reaches the law of the *blend*, errors included.
# * Draw per sample, not per batch; draw systematically, not independently: it costs the same.
# * Judge it against DB-MPA on the same noise, never against the target at few steps, where two errors may cancel.
# * Run DB-MPA once for a new set of adapters and read the certificate: a small one means that draws are cheap too.
