# %% [markdown]
# # Solvers: discretisation that looks like blend error
#
# A blend of fine-tuned diffusion models is not exact (notebook 02). Neither is a solver that takes 25 steps. Both
# errors end up in the same samples, both can be too narrow, too wide or in the wrong mode, and they can cancel. This
# notebook shows how to tell them apart, and then uses three families of solvers on the same equation: the steps of this
# library, `torchsde`, and the schedulers of `diffusers` that Stable Diffusion pipelines run on.
#
# The one tool is the **control**: on a Gaussian mixture the exact target of a preference has a closed form, so its own
# score can be run on the same grid, with the same step and the same noise. Whatever the control gets wrong is the
# solver's. All solvers discretise one backward equation (or the ODE with the same marginals),
#
# $$dx = [f x - g^2 S_t(x)]\,dt + g\,dw, \qquad dx = [f x - \tfrac12 g^2 S_t(x)]\,dt,$$
#
# with the score $S_t$ of the exact target (control) or of the blend, $\sum_i w_i S_{i,t}$ (DB-MPA; Lemma 2 of
# *Diffusion Blend*, arXiv 2505.18547). Black is always the exact target.

# %%
"""Solvers: which error is the blend's and which the step's, with this library's steps, torchsde and diffusers."""

import os

import diffusers
import torch
import torchsde
from IPython.display import Image, display

from sdeblend import STEPS, BackwardSDE, Blend, ReplayNoise, TrainedTable, VPLinear, solve, time_grid, trajectory
from sdeblend.torchsde_bridge import TorchSDE, solve_torchsde
from toy import MixtureStack, mixture_score, problems
from toy.metrics import sliced_w2, sliced_w2_floor
from toy.plotting import OKABE_ITO, Cloud, Style, contours_2d, encoded, panels, points_2d, style_of, window_of
from toy.plotting.curves import FLOOR, curve, label, legend_below

FAST = os.environ.get("SDEBLEND_FAST") == "1"
SAMPLES, REPEATS = (1_000, 2) if FAST else (20_000, 4)
problem, schedule = problems.ring8(kl_weight=0.25), VPLinear()
target = problem.target([0.5, 0.5])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def show(figure):
    """Display a figure as PNG."""
    display(Image(encoded(figure, dpi=90)))


def scores(schedule):
    """Return the control's score and the blend's."""
    blend = Blend(MixtureStack(problem.members(), schedule), [0.5, 0.5])
    return {"exact": mixture_score(target, schedule), "mpa": blend}


def run(step, score, steps, schedule=schedule, repeat=0):
    spacing = "log-snr" if step in ("dpm-2m", "dpm-2m-sde", "heun") else "uniform"
    start, grid = schedule.prior((SAMPLES, 2), generator=seeded(1 + 10 * repeat)), time_grid(schedule, steps, spacing)
    noise = seeded(2 + 10 * repeat)
    return solve(BackwardSDE(schedule, score), start, grid, step=STEPS[step](), noise=noise).samples.double()


def distance(samples, repeat=0):
    return sliced_w2(samples, truths[repeat], generator=seeded(6), projections=32)


truths = [target.sample(SAMPLES, generator=seeded(5 + 10 * repeat)) for repeat in range(REPEATS)]
floor = float(sliced_w2_floor(target, SAMPLES, generator=seeded(7), projections=32, repeats=8).value)
print(f"the floor: {SAMPLES} exact samples are {floor:.4f} from as many others (sliced W2, units of x)")


# %% [markdown]
# ## The same score, five solvers, 25 evaluations
#
# Upper row: the exact score, so nothing here is the blend's fault. Lower row: DB-MPA. Contours hold 50 % and 95 % of
# the exact target.
#
# **It would be wrong to speak of discretisation if** all panels of the upper row filled the contours alike, with a
# distance near the floor; and one could judge a blend without a control if each lower panel were further from the
# target than the one above it.

# %%
NAMES = {
    "euler-maruyama": Style(OKABE_ITO["orange"], "-", "Euler-Maruyama"),
    "ddim-ancestral": Style(OKABE_ITO["vermillion"], "--", "ancestral (DDIM η = 1)"),
    "dpm-2m-sde": Style(OKABE_ITO["green"], "-.", "DPM-Solver++ 2M SDE"),
    "dpm-2m": Style(OKABE_ITO["blue"], (0, (5, 1)), "DPM-Solver++ 2M (ODE)"),
    "heun": Style(OKABE_ITO["purple"], (0, (3, 1, 1, 1)), "Heun (ODE)"),
}
figure, grid = panels(10, columns=5, width=2.7, height=2.9)
window = [window_of([target])[0], (-2.6, 3.4)]
for row, (method, score) in enumerate(scores(schedule).items()):
    for panel, (name, style) in zip(grid[5 * row :], NAMES.items(), strict=False):
        samples = run(name, score, 13 if name == "heun" else 25)
        contours_2d(panel, target, style_of("target"), window, fill=True)
        points_2d(panel, Cloud(samples), style_of(method))
        off, width = distance(samples) / floor, torch.cov(samples.T).trace() / target.covariance.trace()
        panel.set_title(f"{style.label}\n{style_of(method).label}: {off:.1f} floors,\nvariance {width:.2f}", fontsize=9)
        panel.set(xlim=window[0], ylim=window[1], aspect="equal", xlabel="x1", ylabel="x2")
show(figure)

# %% [markdown]
# ## Which error is it?
#
# Take one number, the total variance over the target's, and more and more steps. With the ancestral step DB-MPA passes
# through 1 on its way: at that number of steps it looks perfect, because the step makes samples too narrow and the
# blend makes them too wide. The cure is to subtract the control.
#
# With enough steps all solvers *with noise* agree on what the blend adds. The ODE does not: it has the marginals of the
# SDE for the score of one family of laws, and a blend of scores is not the score of any. So "the error of DB-MPA" is
# the error of DB-MPA *with its SDE*.
#
# **It would be wrong if** the differences to the control (right) of the three solvers with noise did not tend to one
# value, or if the ODE's tended to it as well. (On the right the exact target is zero.)

# %%
counts, shares = (12, 25, 50) if FAST else (12, 25, 50, 100, 200), {}
for name in ("euler-maruyama", "ddim-ancestral", "dpm-2m-sde", "dpm-2m"):
    for method, score in scores(schedule).items():
        runs = [run(name, score, n) for n in counts]
        shares[name, method] = [float(torch.cov(x.T).trace() / target.covariance.trace()) for x in runs]
        print(f"{name:15s} {method:6s}", "  ".join(f"{v:.3f}" for v in shares[name, method]), "at", counts, "steps")

figure, (left, right) = panels(2, width=4.8, height=3.8)
curve(left, counts, [1] * len(counts), style_of("target"))
curve(right, counts, [0] * len(counts), style_of("target"))
for (name, method), values in shares.items():
    colour, text = NAMES[name].colour, NAMES[name].label
    line, title = ("-", f"DB-MPA, {text}") if method == "mpa" else ((0, (1, 1)), f"control, {text}")
    curve(left, counts, values, Style(colour, line, title), marker="o")
    if method == "mpa":
        excess = [a - b for a, b in zip(values, shares[name, "exact"], strict=True)]
        curve(right, counts, excess, Style(colour, line, title), marker="o")
label(left, "what is measured", "steps", "total variance, shares of the target's", xscale="log")
label(right, "DB-MPA less control", "steps", "difference of the shares", xscale="log", ylim=(-0.03, 0.35))
for axes in (left, right):
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
legend_below(figure, columns=2)
show(figure)

# %% [markdown]
# ## How many evaluations does the control need?
#
# The distance from the exact target falls until it meets the floor, what exact samples of the same number have. Where a
# curve lies on the floor, the solver is out of the way and what a blend shows above it is its own.
#
# **It would be wrong if** a curve settled above the floor (a bias of the solver, not of the step size), or if
# DPM-Solver++ 2M, which is built for this equation, did not get there with several times fewer evaluations than
# Euler-Maruyama. (Mean over runs from different starts, noise and exact samples; bands are two standard errors.)

# %%
tried, needed = (10, 20) if FAST else (10, 16, 20, 30, 50, 100), {}
figure, (axes,) = panels(1, width=6.5, height=4.0)
exact = scores(schedule)["exact"]
for name, style in NAMES.items():
    steps = [n // STEPS[name]().evaluations for n in tried]
    off = torch.tensor([[distance(run(name, exact, n, repeat=k), k) for k in range(REPEATS)] for n in steps])
    curve(axes, tried, off.mean(1), style, se=off.std(1) / REPEATS**0.5, marker="o")
    reached = [n for n, value in zip(tried, off.mean(1), strict=True) if value < 1.5 * floor]
    print(f"{style.label:24s} within 1.5 floors from {f'{reached[0]} evaluations' if reached else 'more than these'}")
curve(axes, tried, [floor] * len(tried), FLOOR)
label(axes, "exact score, VP-linear", "score evaluations a sample", "sliced W2 to the exact target, units of x",
      xscale="log", yscale="log")
axes.set_xticks(tried, [str(n) for n in tried])
axes.minorticks_off()
legend_below(figure, columns=3)
show(figure)

# %% [markdown]
# ## A solver that shares no code: torchsde
#
# `sdeblend.torchsde_bridge` presents any backward SDE to `torchsde.sdeint`. On the left, on a line with two modes,
# both solvers integrate DB-MPA on *the same Brownian path* (torchsde's): Euler steps of ours and of theirs must be the
# same numbers. On the right they use noise of their own and must agree in law; shown is the probability of the left
# mode, which DB-MPA gets badly wrong here.
#
# **It would be wrong if** a dot left its line on the left; or if on the right torchsde's solvers and ours differed by
# more than their errors (bands: two standard errors). If DB-MPA (solid) came to the black line with a solver of higher
# order (SRK), its error would be the step's after all.

# %%
line = problems.line2(kl_weight=0.25)
line_target, n = line.target([0.5, 0.5]), 64
line_blend = Blend(MixtureStack(line.members(), schedule), [0.5, 0.5])
line_scores = {"exact": mixture_score(line_target, schedule), "mpa": line_blend}
# times that are exact in binary, so that both ask for the same increments
sde, times = BackwardSDE(VPLinear(t_min=1 / n), line_scores["mpa"]), torch.arange(n, 0, -1, dtype=torch.float64) / n
begin = schedule.prior((8, 1), generator=seeded(3), dtype=torch.float64)
path = torchsde.BrownianInterval(t0=0.0, t1=1 - 1 / n, size=(8, 1), dtype=torch.float64, entropy=0)
theirs = torchsde.sdeint(TorchSDE(sde, 1.0, (1,)), begin, 1 - times, bm=path, method="euler", dt=1 / n)
increments = [path(k / n, (k + 1) / n) * n**0.5 for k in range(n - 1)]
ours = torch.stack([state.x for state in trajectory(sde, begin, times, noise=ReplayNoise(increments))])
print(f"largest difference on one path, {n - 1} steps: {(ours - theirs).abs().max():.1e} (units of x)")

# %%
counts, below = (16, 32) if FAST else (16, 32, 64, 128), {}
begin = schedule.prior((SAMPLES, 1), generator=seeded(1), dtype=torch.float64)
for method, score in line_scores.items():
    sde, grids = BackwardSDE(schedule, score), [time_grid(schedule, count) for count in counts]
    ends = {"our Euler": [solve(sde, begin, grid, noise=seeded(2)).samples for grid in grids]}
    for name in ("euler", "srk"):
        ends[f"torchsde {name}"] = [solve_torchsde(sde, begin, grid, seed=4, method=name) for grid in grids]
    for name, samples in ends.items():
        below[method, name] = [float((x < 0).double().mean()) for x in samples]
        shown = ", ".join(f"{share:.4f}" for share in below[method, name])
        print(f"{style_of(method).label:12s}{name:16s} P(x < 0) = {shown} at {counts} steps")
places = -line_target.means[:, 0] / line_target.covariances[:, 0, 0].sqrt()
exactly = float(line_target.weights @ torch.special.ndtr(places))
print(f"exact target P(x < 0) = {exactly:.4f}")

# %%
figure, (left, right) = panels(2, width=4.8, height=3.8)
left.plot(times, theirs[:, :, 0], color=OKABE_ITO["grey"], linewidth=1.2, label="torchsde Euler")
left.plot(times[::3], ours[::3, :, 0], ".", color=OKABE_ITO["orange"], markersize=5, label="our Euler, same path")
height = torch.linspace(-3, 3, 300, dtype=torch.float64)[:, None]
left.plot(-0.3 * line_target.log_prob(height).exp(), height, color="black", label="exact target (density, past t = 0)")
label(left, "eight paths of DB-MPA, line2", "time t (noise at 1, data at 0)", "x", xlim=(1, -0.3))
left.set_xticks([1, 0.8, 0.6, 0.4, 0.2, 0])
curve(right, counts, [exactly] * len(counts), style_of("target"))
looks = {"our Euler": ("orange", "o"), "torchsde euler": ("grey", "s"), "torchsde srk": ("purple", "^")}
for (method, name), values in below.items():
    line_style, title = ("-", f"DB-MPA, {name}") if method == "mpa" else ((0, (1, 1)), f"control, {name}")
    bars = [(p * (1 - p) / SAMPLES) ** 0.5 for p in values]
    curve(right, counts, values, Style(OKABE_ITO[looks[name][0]], line_style, title), se=bars, marker=looks[name][1])
label(right, "independent noise, line2", "steps", "P(x < 0)", xscale="log", ylim=(0.2, 0.6))
right.set_xticks(counts, [str(n) for n in counts])
right.minorticks_off()
legend_below(figure, columns=3)
show(figure)

# %% [markdown]
# ## diffusers' schedulers, driven by the exact score
#
# A scheduler of `diffusers` asks a network for $\varepsilon$ at a timestep. Nothing stops us from answering with
# $\varepsilon = -\sigma_t S_t(x)$ of a mixture: then a whole Stable Diffusion sampler, on Stable Diffusion's own noise
# schedule, runs with a network that makes no error. The loop below is what a pipeline does. Some of these schedulers
# are steps of this library under another name; printed is how far apart they end on the same start and noise. They
# differ by what diffusers rounds: its tables to single precision, and with some grids the time at which the network is
# asked to a whole timestep. A few samples on a watershed between two modes feel that.
#
# **It would be wrong if** the median difference were visible in a figure.

# %%
table = TrainedTable.stable_diffusion()
begin = table.prior((SAMPLES, 2), generator=seeded(1))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drive(scheduler, score, steps, x=begin, **options):
    """Run a diffusers scheduler as a pipeline does, the score in the place of the network."""
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t = table.time_of_timestep(float(timestep)).clamp(table.t_min, 1)
        eps = -float(table.sigma(t)) * score(scheduler.scale_model_input(x, timestep), t)
        x = scheduler.step(eps, timestep, x, **options).prev_sample
    return x.double()


exact = scores(table)["exact"]  # now on Stable Diffusion's schedule
twins = {
    "ddim-ancestral": diffusers.EulerAncestralDiscreteScheduler(**SD),
    "dpm-2m": diffusers.DPMSolverMultistepScheduler(**SD, use_lu_lambdas=True),
    "dpm-2m-sde": diffusers.DPMSolverMultistepScheduler(**SD, use_lu_lambdas=True, algorithm_type="sde-dpmsolver++"),
}
for name, scheduler in twins.items():
    noise = {} if name == "dpm-2m" else {"generator": seeded(2)}
    apart = (drive(scheduler, exact, 20, **noise) - run(name, exact, 20, table)).abs()
    title = type(scheduler).__name__.removesuffix("Scheduler")
    print(f"{name:15s} and {title:24s} apart by {apart.median():.0e} (median), {apart.max():.0e} (most), units of x")

# %% [markdown]
# ## The same question, asked of diffusers
#
# Schedulers with noise on the left, without on the right; dotted the control, solid DB-MPA.
#
# **It would be wrong to blame the blend if** a solid curve did not stay above its dotted one as steps are added, and to
# blame the scheduler if the dotted one did not start far above the floor. Note the solid curves that begin *below*
# their dotted ones: with few steps DB-MPA looks better than the exact score. And note where the dotted curves on the
# right end: a scheduler that only lacked steps would come down to the floor.

# %%
ddim = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
dpm, karras = diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}
NOISY = {
    "DDIM, η = 1": (ddim, {"eta": 1.0}),
    "DDPM": (diffusers.DDPMScheduler(**SD, clip_sample=False), {}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler(**SD), {}),
    "DPM++ 2M SDE Karras": (dpm(**SD, **karras, algorithm_type="sde-dpmsolver++"), {}),
}
PLAIN = {
    "DDIM, η = 0": (ddim, {}),
    "Euler": (diffusers.EulerDiscreteScheduler(**SD), {}),
    "DPM++ 2M Karras": (dpm(**SD, **karras), {}),
    "UniPC": (diffusers.UniPCMultistepScheduler(**SD), {}),
}
counts, ends = (10, 20) if FAST else (10, 20, 50, 100), {}
for name, (scheduler, options) in {**NOISY, **PLAIN}.items():
    for method, score in scores(table).items():
        noisy = name in NOISY
        runs = [drive(scheduler, score, n, **options, **({"generator": seeded(2)} if noisy else {})) for n in counts]
        ends[name, method] = [distance(x) for x in runs]
    shown = ("  ".join(f"{v / floor:4.1f}" for v in ends[name, method]) for method in ("exact", "mpa"))
    print(f"{name:20s} at {counts} steps, in floors: control {next(shown)},  DB-MPA {next(shown)}")

# %%
figure, grid = panels(2, width=4.8, height=4.2)
for axes, group, title in ((grid[0], NOISY, "schedulers with noise"), (grid[1], PLAIN, "schedulers without noise")):
    for colour, name in zip(("vermillion", "orange", "sky", "green"), group, strict=True):
        curve(axes, counts, ends[name, "exact"], Style(OKABE_ITO[colour], (0, (1, 1)), f"control, {name}"), marker="o")
        curve(axes, counts, ends[name, "mpa"], Style(OKABE_ITO[colour], "-", f"DB-MPA, {name}"), marker="s")
    curve(axes, counts, [floor] * len(counts), FLOOR)
    label(axes, title, "steps", "sliced W2 to the exact target, units of x", xscale="log", ylim=(0, 0.3))
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
show(figure)

# %% [markdown]
# ## A third error: the start
#
# Without noise more steps do not help: those schedulers end at the same distance from the target, with the exact
# score. The reason is neither step nor blend. Stable Diffusion's schedule stops with a little signal left, and a
# pipeline starts from $N(0, 1)$ all the same. The ODE carries what is missing at the start through to the end; the SDE
# forgets it, because it keeps adding noise. On VP-linear, ten times less signal is left.
#
# **It would be wrong if** a start with the right mean and covariance did not bring the ODE to the floor, or if the SDE
# minded the start as much as the ODE does.

# %%
last = target.noised(table, 1.0)
left_over = [float(s.alpha(1.0)) for s in (table, schedule)]
print(f"signal left at the start: alpha = {left_over[0]:.4f} (Stable Diffusion), {left_over[1]:.4f} (VP-linear)")
print(f"the target's mean at the start is {[round(v, 3) for v in last.mean.tolist()]}, not 0")
matched = (begin.double() @ torch.linalg.cholesky(last.covariance).T + last.mean).float()
figure, (axes,) = panels(1, width=6.5, height=4.0)
for step, colour, kind in (("dpm-2m", "blue", "ODE"), ("dpm-2m-sde", "green", "SDE")):
    for start, line_style, title in ((begin, "-", "N(0, 1)"), (matched, (0, (4, 2)), "the right moments")):
        sde = BackwardSDE(table, exact)
        runs = [solve(sde, start, time_grid(table, n, "log-snr"), step=STEPS[step](), noise=seeded(2)) for n in counts]
        off = [distance(x.samples) for x in runs]
        curve(axes, counts, off, Style(OKABE_ITO[colour], line_style, f"control, {kind} from {title}"), marker="o")
        width = float(torch.cov(runs[-1].samples.double().T).trace() / target.covariance.trace())
        print(f"{kind} from {title:18s}{off[-1] / floor:4.1f} floors, variance {width:.3f}; {counts[-1]} steps")
curve(axes, counts, [floor] * len(counts), FLOOR)
label(axes, "exact score, Stable Diffusion's schedule, DPM-Solver++ 2M", "steps",
      "sliced W2 to the exact target, units of x", xscale="log", ylim=(0, None))
axes.set_xticks(counts, [str(n) for n in counts])
axes.minorticks_off()
legend_below(figure, columns=2)
show(figure)

# %% [markdown]
# ## In short
#
# * Run the control. Where no exact score exists (on images), run the same blend with twice the steps: what changes is
#   the step's.
# * A single number (a variance, a mean reward) can be right because two errors cancel. Look at how it moves with the
#   number of steps.
# * On this equation the multistep exponential solvers need several times fewer evaluations than Euler-Maruyama.
# * Blend with noise. The certificate and the correction (notebook 01) need it, the blend's error was smaller with it
#   here, and noise forgets a start that is slightly wrong.
