# %% [markdown]
# # A member of your own
#
# `06_stable_diffusion` blends members that come with the package. Here one is made: a reward in two lines of Python, a
# member tuned for it on one thread of a laptop, at a KL weight that is known, and then blended. Everything runs on the
# small bundled model; the last cell says what changes for Stable Diffusion 1.5.
#
# Tuning for a reward $r$ at KL weight $\alpha$ aims at the *tilt* $p_{\mathrm{base}}\,e^{r/\alpha}/Z$, caption by
# caption. It can only move what a caption leaves open. Captions here name an object and not its background, and the
# reward asks for **warm light**, mean red minus mean blue. So the target can be told in words: red and yellow
# backgrounds become frequent, blue and cyan ones rare, and the object stays what the caption says.

# %%
"""Tune a member for a reward of one's own, check it against its target, blend it with a bundled member."""

import json
import os
import tempfile
import time
from pathlib import Path

import torch
from IPython.display import Image, display

from sdeblend import Preference
from sdeblend.finetune.config import load_tuning
from sdeblend.finetune.run import METRICS, train
from sdeblend.finetune.trainers.backprop import BackpropSettings, RewardBackprop
from sdeblend.reward import WeightedReward
from sdeblend.shell.figures import contact_sheet, curves, encoded
from stablediffusion import load_members
from stablediffusion.finetune import PipelineTunable
from stablediffusion.rewards import REWARDS
from stablediffusion.scenes.captions import COLOURS, SHAPES, SIZES, parse
from stablediffusion.scenes.scorer import accuracies
from stablediffusion.small import load_small
from stablediffusion.small.cells import draw_cell, mean_and_error
from stablediffusion.small.files import GUIDANCE, bundled_member

FAST = os.environ.get("SDEBLEND_FAST") == "1"
ITERATIONS, EACH, FEW, STEPS = (2, 2, 1, 4) if FAST else (150, 32, 8, 25)
folder = tempfile.TemporaryDirectory()
out = Path(folder.name)


def show(figure, dpi=90):
    """Display a figure as PNG."""
    display(Image(encoded(figure, dpi=dpi)))


# %% [markdown]
# ## A reward is a function
#
# It takes images (B, 3, H, W) in [0, 1] and the condition (its `prompts` are the captions, not needed here), and
# returns one number an image. If gradients reach the images, as here, every trainer can use it; one without gradients
# (a count, a file's size) needs `regression`, `ddpo` or `dpok`.
#
# The base's pictures of some captions give its **standard deviation within a caption**, which is what tuning can move.
# Divided by it, $\alpha$ is in standard deviations and means the same for every reward.
#
# **It would be wrong if** pictures did not get warmer from left to right.


# %%
def warm(images, condition):
    """Return mean red minus mean blue, (B,)."""
    return (images[:, 0] - images[:, 2]).mean((1, 2))


captions = [f"a {size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES]
unseen = captions[2::7]  # kept for the check
captions = [caption for caption in captions if caption not in unseen]

pipe, some = load_small(), captions[:2] if FAST else captions[::7]
chain = {"num_inference_steps": STEPS, "eta": 1.0, "guidance_scale": 1.0}
noise = torch.Generator().manual_seed(1)
images = pipe(some, num_images_per_prompt=EACH, generator=noise, output_type="pt", **chain).images
values = warm(images, None)
by_caption = values.reshape(len(some), EACH)
SD = float(by_caption.var(1).mean().sqrt())
print(f"warm, standard deviation: {SD:.3f} within a caption, {float(values.std()):.3f} over all pictures")
ranked = values.argsort()[torch.linspace(0, len(values) - 1, 4 if FAST else 8).long()]
names = [f"{float(values[i]):+.2f}" for i in ranked]
show(contact_sheet([[images[i : i + 1] for i in ranked]], rows=["warm"], columns=names, across=1, zoom=2))

# %% [markdown]
# ## Tune it
#
# The reward has gradients, so `backprop` serves best here: it draws pictures in a chain of six steps, differentiates
# reward and KL through the whole of it, and follows the gradient. (`adjoint` does about as well in the same time;
# `regression`, the default, needs no gradients and many more reward calls.) It trains LoRA weights only and charges the
# KL of the processes, so that `kl_weight` is the theory's $\alpha$.
#
# **What would falsify the next figure:** the black dashes are the mean that the target has, estimated from the base's
# pictures above: each counts with weight $e^{r/\alpha}$ within its caption. Tuning must rise from the base's mean
# towards it and must not pass it.

# %%
settings = BackpropSettings(
    kl_weight=0.5, groups=2 if FAST else 8, group_size=2, steps=3 if FAST else 6, spacing="uniform",
    learning_rate=2e-3, ema_decay=0.95,
)  # fmt: skip
adapter = {"rank": 6, "layers": ["attention", "feed-forward", "convolutions"]}
reward = WeightedReward({"mine:warm": warm}, {"mine:warm": round(1 / SD, 2)})
model = PipelineTunable(pipe, captions, seed=settings.seed, batch=64, decode_batch=64, **adapter)
wall, processor = time.perf_counter(), time.process_time()
file = train(RewardBackprop(model, reward, settings), out / "warm", iterations=ITERATIONS)
wall, processor = time.perf_counter() - wall, time.process_time() - processor
print(f"{ITERATIONS} iterations took {processor:.0f} s of one thread, {wall:.0f} s by the clock of a busy machine")


def tilted(rewards, power):
    """Return each caption's mean of rewards (C, N) under weights exp(power r), and the effective sample size."""
    weights = (power * rewards.double()).softmax(1)
    return (weights * rewards).sum(1), 1 / weights.square().sum(1)


log = [json.loads(line) for line in (out / "warm" / METRICS).read_text().splitlines()]
block = 2 if FAST else 10
blocks = torch.tensor([entry["reward"] for entry in log]).reshape(-1, block)
after = [block * (k + 0.5) for k in range(len(blocks))]
mean = [float(by_caption.mean() / SD)] * 2
aim = [float(tilted(by_caption / SD, 1 / settings.kl_weight)[0].mean())] * 2
lines = {"member, while it is tuned": (after, blocks.mean(1).tolist(), (blocks.std(1) / block**0.5).tolist())}
lines |= {"base": ([0, ITERATIONS], mean, None), "target": ([0, ITERATIONS], aim, None)}
show(curves(lines, x="iteration", y="warm, standard deviations", dashed=["target"]))

# %% [markdown]
# The same from the command line, with the function in a file `mine.py`, is `sdeblend finetune warm.toml` and this file:

# %%
toml = f"""[model]
kind = "pipeline"            # the bundled one, for there is no path
prompts = "captions.txt"     # one a line
rank = {adapter["rank"]}
layers = {json.dumps(adapter["layers"])}
[rewards]
"mine:warm" = {reward.weights["mine:warm"]}           # 1/sd, so that kl_weight is in standard deviations
[trainer]
name = "backprop"
kl_weight = {settings.kl_weight}
groups = {settings.groups}
group_size = {settings.group_size}
steps = {settings.steps}
spacing = "{settings.spacing}"
learning_rate = {settings.learning_rate}
ema_decay = {settings.ema_decay}
iterations = {ITERATIONS}
[output]
folder = "out/warm"
"""
(out / "warm.toml").write_text(toml)
print(toml)
print("the same settings:", load_tuning(out / "warm.toml").settings == settings)

# %% [markdown]
# ## Did it learn what it was asked to?
#
# `train` has written a LoRA file that says what it was tuned for. It is loaded beside the bundled `vivid`, as any
# member is, and draws captions that it was not tuned on. Base and member have the same noise, and pictures of one
# caption are compared with each other only, in standard deviations within a caption. The target is known through the
# base's pictures alone: weighted by $e^{r/\alpha}$ within the caption. The effective sample size says how many pictures
# that estimate rests on.
#
# **What would falsify the next figures:** orange must leave blue towards the black dashes, in the first figure as a
# law (the target has its weight where the base's warm backgrounds are, and nothing beyond), in the second caption by
# caption. So short a tuning does not get all the way, and the printed difference says how far it is; more iterations go
# further.

# %%
pipe = load_small()
members = load_members(pipe, {"warm": file, "vivid": bundled_member("vivid")})
found = members["warm"]
print(f"warm: reward {dict(found.reward)} at KL weight {found.kl_weight:g}, guidance {found.guidance:g}")
own = {"warm": warm, "vivid": REWARDS["vivid"]}
common = {"steps": STEPS, "rewards": own}
many = common | {"prompts": unseen[:3] if FAST else unseen, "each": EACH, "guidance": 1.0, "seed": 10}
base, tuned = (draw_cell(pipe, members, Preference({"warm": 1.0}, strength=s), **many) for s in (0.0, 1.0))
r = {name: cell.rewards["warm"].reshape(-1, EACH).double() / SD for name, cell in (("base", base), ("member", tuned))}
aim, effective = tilted(r["base"], 1 / found.kl_weight)
moved, wanted = r["member"].mean(1) - r["base"].mean(1), aim - r["base"].mean(1)
for name, value in (("member", moved), ("target", wanted), ("member - target", moved - wanted)):
    print("{}: moved by {:+.2f} +- {:.2f} sd".format(name, *mean_and_error(value)))
print(f"effective sample size of the target: {float(effective.mean()):.1f} of {EACH} pictures a caption")
asked = [parse(prompt) for prompt in many["prompts"] for _ in range(EACH)]
for name, cell in (("base", base), ("member", tuned)):
    right = accuracies(2 * cell.images - 1, asked)
    shares = {k: (100 * right[k]["accuracy"], 100 * right[k]["error"]) for k in ("colour", "shape", "size")}
    print(f"{name}: right", ", ".join("{} {:.1f} +- {:.1f} %".format(k, *share) for k, share in shares.items()))

edges = torch.linspace(-3.25, 3.25, 14).double()


def law(rewards, power=0.0):
    """Return bins, their shares under weights exp(power r) and standard errors, over captions."""
    weights = (power * rewards).softmax(1)
    inside = (torch.bucketize(rewards, edges)[:, :, None] == torch.arange(1, len(edges))).double()
    shares = 100 * (weights[:, :, None] * inside).sum(1)
    return ((edges[1:] + edges[:-1]) / 2).tolist(), *zip(*map(mean_and_error, shares.T), strict=True)


laws = {"base": law(r["base"]), "member": law(r["member"]), "target": law(r["base"], 1 / found.kl_weight)}
show(curves(laws, x="warm, standard deviations", y="pictures, %", dashed=["target"]))
order = wanted.argsort()
each = {name: (range(len(order)), v[order].tolist(), None) for name, v in (("member", moved), ("target", wanted))}
figure = curves(each, x="", y="moved, standard deviations", dashed=["target"])
figure.axes[0].set_xticks(range(len(order)), [many["prompts"][i][2:] for i in order], rotation=45, ha="right")
show(figure)

# %% [markdown]
# ## Blend it
#
# From here on nothing tells the new member from the bundled one. Pictures at the model's usual guidance, the same
# prompts and noise in every cell.
#
# **What would falsify the next figure:** from left to right pictures must get warmer and less colourful, and the
# certificate must be zero at the ends, where one member runs alone, and positive between.

# %%
def note(cell, certified=True):
    """Return what stands under a cell."""
    lines = ["{} {:+.2f} ± {:.2f}".format(name, *cell.mean(name)) for name in own]
    nats = ["certificate {:.2g} ± {:.1g} nats".format(*mean_and_error(cell.nats))] if certified else []
    return "\n".join(lines + nats)


shown = common | {"prompts": unseen[1:4:2] if FAST else unseen[1:9:2], "each": 2, "guidance": GUIDANCE}
weights = [0.0, 0.5, 1.0] if FAST else [0.0, 0.25, 0.5, 0.75, 1.0]
cells = [draw_cell(pipe, members, Preference({"warm": w, "vivid": 1 - w}), **shown) for w in weights]
columns = [f"warm {w:g}, vivid {1 - w:g}" for w in weights]
show(contact_sheet([[c.images for c in cells]], rows=["blend"], columns=columns, notes=[[note(c) for c in cells]]))

# %% [markdown]
# ## Turn the strength
#
# Strength 0 is the base, 1 the member as tuned, 2 aims at $e^{2r/\alpha}$: a target which the base's pictures give
# again, from fewer effective ones.
#
# **It would be wrong if** the column of strength 0 were not the base's pictures, or if warmth did not grow with the
# strength. Above 1 nothing was tuned: there the curve may leave the dashes, and certificates say little, since their
# weights have heavy tails (`03_strength`).

# %%
strengths = [0.0, 1.0, 2.0] if FAST else [0.0, 0.5, 1.0, 1.5, 2.0]
turn = [Preference({"warm": 1.0}, strength=s) for s in strengths]
cells = [draw_cell(pipe, members, preference, **shown) for preference in turn]
columns = [f"strength {s:g}" for s in strengths]
notes = [[note(c, certified=False) for c in cells]]
show(contact_sheet([[c.images for c in cells]], rows=["warm"], columns=columns, notes=notes))
few = many | {"each": FEW}
found = [draw_cell(pipe, members, preference, **few).rewards["warm"] for preference in turn]
found = [value.reshape(-1, FEW).double() / SD for value in found]
means, errors = zip(*(mean_and_error(value.mean(1)) for value in found), strict=True)
aims = [float(tilted(r["base"], s / members["warm"].kl_weight)[0].mean()) for s in strengths]
lines = {"member": (strengths, means, errors), "target": (strengths, aims, None)}
show(curves(lines, x="strength", y="warm, standard deviations", dashed=["target"]))

# %% [markdown]
# ## Your own model
#
# `sdeblend finetune` takes the same file for any diffusers pipeline: under `[model]` add `path = "..."` (a folder or a
# hub id) and, where memory is short, `checkpointing = true`; under `[trainer]` `precision = "bf16"` and a smaller
# `micro_batch`. `accelerate launch -m sdeblend.finetune warm.toml` spreads it over several GPUs. A killed run goes on
# with `--resume` and ends in the same member. Rewards are functions as above, or learned ones (aesthetic score,
# PickScore, CLIPScore, ImageReward, HPSv2, in `stablediffusion.rewards`) named under `[model.rewards]` with a hub id or
# a folder. `load_members` then reads KL weight, reward and base from the file and refuses a member of another base.
