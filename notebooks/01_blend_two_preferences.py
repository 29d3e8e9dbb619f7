# %% [markdown]
# # Blend two preferences
#
# A pre-trained diffusion model has been fine-tuned twice, once for each of two rewards. Tonight somebody wants both
# at half strength, and nobody will train a third model. *Diffusion Blend* (Cheng et al., arXiv 2505.18547) answers:
# at each sampling step, average the two models' scores. This notebook does so on a two-dimensional mixture on which
# everything is known in closed form, and looks at four things:
#
# 1. what fine-tuning for a reward does to a distribution (Proposition 1);
# 2. what the blend, **DB-MPA** (Lemma 2, Algorithm 1), makes of two fine-tuned models, and what it gets wrong;
# 3. a **certificate**: an upper bound on that error, from the same run, without looking at the target;
# 4. a **correction** that removes the error.
#
# Every comparison has a **control**: the exact score of the target, run on the same time grid, with the same solver
# and the same noise. What the control gets wrong too is the solver's error and not the blend's.

# %%
"""Blend two preferences: tilts, DB-MPA, its certificate and its correction, on a ring of eight modes."""

import os

import torch
from IPython.display import Image, display

from sdeblend import BackwardSDE, Blend, Preference, VPLinear, solve, time_grid
from toy import metrics, problems
from toy.experiment import BlendSettings, run
from toy.plotting import Cloud, encoded, member_style, panels, style_of
from toy.plotting.curves import CERTIFICATE, certified, curve, kl_of_modes, label, legend_below, measured
from toy.plotting.modes import laws_figure, modes_figure

FAST = os.environ.get("SDEBLEND_FAST") == "1"  # the tests run a short version
SAMPLES = 1_000 if FAST else 20_000
print("fast mode: few samples, rough numbers" if FAST else f"{SAMPLES} samples a run")


def show(figure):
    """Display a figure as PNG."""
    display(Image(encoded(figure, dpi=90)))


# %% [markdown]
# ## The models
#
# The base $p_{\mathrm{pre}}$ has eight modes on a ring. Two rewards pull to the right and up, $r_1 \propto x_1$ and
# $r_2 \propto x_2$, each scaled to unit variance. Fine-tuning for $r_i$ with KL weight $\alpha$ means $\max_p \;
# \mathrm{E}_p[r_i] - \alpha\,\mathrm{KL}(p\,\Vert\,p_{\mathrm{pre}})$, and Proposition 1 gives the optimum, the
# *tilt*
#
# $$p^{(r,\alpha)}(x) = p_{\mathrm{pre}}(x)\, e^{r(x)/\alpha} / Z .$$
#
# For weights $w$ the wanted law is the tilt by $r(w) = w_1 r_1 + w_2 r_2$. Tilts of a Gaussian mixture by such
# rewards are Gaussian mixtures again: that is why the target is known here.
#
# **What would falsify the next figure:** reweighting samples of the *base* by $e^{r/\alpha}$ is another way to the
# same laws. If the dots (reweighted base samples) did not fill the contours (closed form), or if the shares of the
# eight modes differed by more than about four standard errors, the closed form would be wrong and everything below
# with it.

# %%
problem = problems.ring8(kl_weight=0.25)
half = {"right": 0.5, "up": 0.5}
rewards = {name: problem.rewards[name] for name in problem.names} | {"exact target": problem.reward(half)}
laws = {"base": (problem.base, style_of("base"))}
laws |= {f"'{name}'": (problem.member(name), member_style(i, name)) for i, name in enumerate(problem.names)}
laws |= {"exact target": (problem.target(half), style_of("target"))}

x = problem.base.sample(20 * SAMPLES, generator=torch.Generator().manual_seed(1))
factors = [torch.zeros(len(x)).double(), *(reward(x) / problem.kl_weight for reward in rewards.values())]
clouds = {title: Cloud(x, log_weights) for title, log_weights in zip(laws, factors, strict=True)}
slopes = {title: r.linear for title, r in zip(list(laws)[1:], rewards.values(), strict=True)}
show(laws_figure(problem.target(half), laws, clouds, slopes))

for title, (law, _) in laws.items():
    found = metrics.mode_weights(x, law, log_weights=clouds[title].log_weights)
    error = ((found.value - law.weights) / found.se).abs().max()
    print(f"{title:13} shares of the modes, %: {(100 * law.weights).round(decimals=1).tolist()}, off by {error:.1f} se")

# %% [markdown]
# ## The blend
#
# A diffusion sampler for the tilt needs its score at all noise levels, $S_t = \nabla \log p_t$. DB-MPA replaces the
# unknown score of the target by the average of the known ones (Lemma 2):
#
# $$S_t \;\approx\; w_1 S^{(r_1,\alpha)}_t + w_2 S^{(r_2,\alpha)}_t .$$
#
# In this library: a `Preference` makes coefficients over base and members that sum to one, a `Blend` of the members'
# scores is itself a score, and `solve` runs its backward SDE. This is the whole program:

# %%
schedule = VPLinear()
blend = Blend(problem.stack(schedule), Preference(half))
noise = torch.Generator().manual_seed(0)
start = schedule.prior((SAMPLES, 2), generator=noise)
grid = time_grid(schedule, 200)
solution = solve(BackwardSDE(schedule, blend), start, grid, noise=noise, correct="certify")
found = metrics.mode_weights(solution.samples, problem.target(half))
print("modes, exact, %:  ", (100 * problem.target(half).weights).round(decimals=1).tolist())
print("modes, blended, %:", (100 * found.value).round(decimals=1).tolist())
print("certificate:", solution.certificate)

# %% [markdown]
# ## What it gets wrong
#
# `toy.experiment.run` does the same for several methods on the same noise, with the control beside them.
#
# **What would falsify the claim that the blend is wrong:** if the control (exact score, same grid, step and noise)
# missed the shares of the modes as well, the solver would be to blame; if the blend's bars stood within the whiskers
# of the exact ones, nobody would be. And if the control were off by much more than exact samples are (the printed
# floor), 200 steps would be too few to judge anything.

# %%
methods = ("exact", "mpa", "mpa-corrected")
outcome = run(problem, BlendSettings(weights=half, methods=methods, samples=SAMPLES))
show(modes_figure(outcome, ["exact", "mpa"]))

for method in ("exact", "mpa"):
    row = outcome.report["methods"][method]
    gained = ", ".join(f"{name} {value:.3f}" for name, value in row["mean_reward"].items())
    off = f"mode weights off by {row['mode_weight_tv']:.4f} (floor {row['mode_weight_tv_floor']:.4f})"
    print(f"{style_of(method).label:12} {off}, mean rewards {gained}")
gained = ", ".join(f"{name} {value:.3f}" for name, value in outcome.report["target"]["mean_reward"].items())
print(f"exact target mean rewards {gained}")

# %% [markdown]
# The blend gives too little to the mode between the two rewards. Notice that its mean rewards say little about this:
# a mean reward may fall short of the target's or exceed it. Shares of modes, distances and the certificate are tests
# of bias; rewards are not.
#
# ## A certificate, without looking at the target
#
# The members' scores are at hand in every step, and how much they disagree tells how wrong the blend can be. With
# coefficients $c_i$ and the blend $\bar S = \sum_i c_i S_i$, gather along each path
#
# $$ \mathrm{d}\log W = -\tfrac{1}{2} g^2 \Big(\sum_i c_i |S_i|^2 - |\bar S|^2\Big)\,\mathrm{d}t , \qquad
# \mathrm{KL}(\text{blend}\,\Vert\,\text{target}) \;\le\; \log \mathrm{E}[W] - \mathrm{E}[\log W] .$$
#
# It needs no further evaluation of a model, no reward and no sample of the target. (In discrete time, the right side
# *is* the KL divergence between the blended chain and the normalised geometric mean of the members' chains.
# `sdeblend.correct` says more.)
#
# **What would falsify the next figure:** a KL divergence of the mode weights above the certificate at some
# preference, for it can only be smaller than the KL divergence of the laws, which the certificate bounds; a
# certificate that is not zero where the preference names one reward only, since then the blend *is* that model; or a
# control as far off as the blend.

# %%
shares = [0.0, 0.5, 1.0] if FAST else [i / 8 for i in range(9)]
few = {"methods": ("exact", "mpa"), "samples": SAMPLES // 2}
swept = [run(problem, BlendSettings(weights=(share, 1 - share), **few)) for share in shares]
figure, (left, middle, right) = panels(3, width=4.2)
measured(left, shares, swept, "mode_weight_tv", ("exact", "mpa"))
label(left, "error of the mode weights", "weight of 'right'", "total variation")
certified(middle, shares, swept)
label(middle, "the bound and what it bounds", "weight of 'right'", "nats")
curve(right, grid[:-1], solution.certificate.profile / -grid.diff(), CERTIFICATE)
label(right, "where the blend loses it (equal weights)", "time t (data at 0, noise at 1)", "nats per unit of time")
legend_below(figure, columns=3, note="bands are two standard errors")
show(figure)

for share, o in zip(shares, swept, strict=True):
    row, kl = o.report["methods"]["mpa"], kl_of_modes(o, "mpa")
    print(f"weight {share:.3f}: certificate {row['certificate']:.4f} nats, KL of the mode weights {kl:.4f}")

# %% [markdown]
# ## The correction
#
# The same weights $W$ correct the blend: reweighted by $W$, its paths have exactly the law $\propto \prod_i
# p_{i,t}^{c_i}$ at time $t$, and at $t = 0$ that is the wanted target. `correct="resample"` uses them as sequential
# Monte Carlo does: it redraws the samples when their effective number falls below half, and returns the weights
# gathered since. **Use the weights it returns**; where the effective number never fell that far, nothing has been
# redrawn and all of the correction is in them. In closed form $\mathrm{E}[W] = Z_{r(w)} / \prod_i Z_i^{c_i}$, which
# tests sign and size of the weights.
#
# **What would falsify the correction:** green bars that miss the black ones by more than their whiskers, or an
# estimate of $\log \mathrm{E}[W]$ away from its closed form by more than its standard errors and a step-size error of
# a few hundredths (a wrong sign would be off by nats).

# %%
show(modes_figure(outcome, methods))

for method in methods:
    row = outcome.report["methods"][method]
    off = f"mode weights off by {row['mode_weight_tv']:.4f}, sliced W2 {row['sliced_w2']:.4f}"
    print(f"{style_of(method).label:17} {off} (floors {row['mode_weight_tv_floor']:.4f}, {row['sliced_w2_floor']:.4f})")
estimate, error = row["log_normalizer_estimate"], row["log_normalizer_estimate_se"]
print(f"log E[W] {estimate:.3f} +- {error:.3f}, closed form {row['log_normalizer_closed_form']:.3f}")
print(f"effective samples without resampling {row['ess_fraction']:.0%}")

# %% [markdown]
# ## When to worry: the KL weight
#
# A smaller $\alpha$ means stronger tilts, members that disagree more, and a worse blend.
#
# **What would falsify the next figure:** a corrected error that leaves the floor of exact samples while the effective
# share of samples is still high; a KL divergence of the mode weights above the certificate by more than the control's
# own (what sampling alone gives); or a certificate that does not shrink as $\alpha$ grows, where the blend becomes
# exact.

# %%
alphas = [0.1, 1.0] if FAST else [0.1, 0.175, 0.25, 0.5, 1.0, 2.0]
settings = BlendSettings(weights=half, methods=methods, samples=SAMPLES // 2)
swept = [run(problem.with_kl_weight(alpha), settings) for alpha in alphas]
figure, (left, middle, right) = panels(3, width=4.2)
measured(left, alphas, swept, "mode_weight_tv", methods)
label(left, "error of the mode weights", "KL weight α", "total variation", xscale="log")
certified(middle, alphas, swept)
label(middle, "the bound and what it bounds", "KL weight α", "nats", xscale="log", yscale="log")
measured(right, alphas, swept, "ess_fraction", ("mpa",))
label(right, "effective share of the samples", "KL weight α", "share without resampling", xscale="log", ylim=(0, 1.05))
legend_below(figure, columns=3, note="bands are two standard errors")
show(figure)

for alpha, o in zip(alphas, swept, strict=True):
    off = ", ".join(f"{m} {o.report['methods'][m]['mode_weight_tv']:.4f}" for m in methods)
    print(f"alpha {alpha:<5g}: {off}, floor {o.report['methods']['mpa']['mode_weight_tv_floor']:.4f}")

# %% [markdown]
# ## What to remember
#
# * A blend of fine-tuned models is not the model fine-tuned for the blend of rewards. It is close where the KL weight
#   is large, and the certificate, which comes with the samples, says how close at least.
# * Its error is visible in the shares of modes, hardly in mean rewards.
# * The correction needs no further evaluation of a model. It redistributes what the blend has found: where the
#   effective share of samples is small, draw more samples, and do not expect modes that no sample has visited.
#
# Next: `02_why_it_is_not_exact` opens the black box, `03_strength` turns one model up and down,
# `04_one_adapter_a_step` evaluates one model a step instead of two, `05_solvers` separates the error of solvers from
# that of blends.
