# %% [markdown]
# # The same operator on Stable Diffusion
#
# The five notebooks before this one blend scores of Gaussian mixtures. Here the same `Blend` object blends the scores
# of a text-to-image model: `StableDiffusionPipeline` from diffusers, with CLIP text encoder, UNet with cross-attention,
# autoencoder and DDIM. So that it runs offline on a laptop it is the small model that comes with the package, trained
# on drawings of one or two shapes, 32 x 32 pixels. Its members are LoRA files tuned for one reward each, at a known KL
# weight: `compress` for small JPEG files, `vivid` for colourfulness.
#
# The exact target has no closed form here, but it can be sampled: drawings are free, so draw many for a caption and
# keep each with probability proportional to $\exp(r/\alpha)$. Black dashes are that. Beside it stand **members tuned
# for the preference itself** (`morl-50` and its like): what multi-objective training gives, at one training each.

# %%
"""Blend, strength, certificate, one adapter a step and soup, on the bundled text-to-image model."""

import os
from dataclasses import replace

import torch
from IPython.display import Image, display

from sdeblend import Preference
from sdeblend.shell.figures import contact_sheet, curves, encoded
from stablediffusion import load_members
from stablediffusion.small import load_small
from stablediffusion.small.candidates import draw_candidates
from stablediffusion.small.cells import PROMPTS, draw_cell, mean_and_error
from stablediffusion.small.demo import NAMES, note
from stablediffusion.small.files import GUIDANCE, bundled_member, bundled_names

FAST = os.environ.get("SDEBLEND_FAST") == "1"
EACH, MANY, STEPS, CANDIDATES = (1, 2, 4, 16) if FAST else (2, 16, 50, 256)
pipe = load_small()
names = ["compress", "vivid"]
members = load_members(pipe, {name: bundled_member(name) for name in names})
for name in names:
    print(f"{name}: tuned at KL weight {members[name].kl_weight:.3g} of its reward")
print("bundled:", ", ".join(bundled_names()))


def show(figure, dpi=90):
    """Display a figure as PNG."""
    display(Image(encoded(figure, dpi=dpi)))


def pair(vivid):
    """Return the preference with this weight on vivid and the rest on compress."""
    return Preference({"compress": 1 - vivid, "vivid": vivid})


# %% [markdown]
# ## Turning the weight
#
# Both rows start from the same noise and follow the same noise. DB-MPA runs both members at every step and blends what
# they predict; the soup averages their weights and runs the average once.
#
# **What would falsify the next figure:** the end columns (one member alone) are the same model in both rows, so their
# images must agree; JPEG size must fall to the left and colourfulness rise to the right. (The errors under the cells
# are those of a mean over eight different pictures; cells share prompts and noise, so their differences are smaller.)

# %%
weights = [0.0, 0.5, 1.0] if FAST else [0.0, 0.25, 0.5, 0.75, 1.0]
modes = ["mpa", "soup"]
cells = {m: [draw_cell(pipe, members, pair(w), mode=m, each=EACH, steps=STEPS) for w in weights] for m in modes}
show(
    contact_sheet(
        [[cell.images for cell in cells[m]] for m in modes],
        rows=[NAMES[m] for m in modes],
        columns=[f"compress {1 - w:g}, vivid {w:g}" for w in weights],
        notes=[[note(cell) for cell in cells[m]] for m in modes],
        across=EACH,
    )
)
ends = [float((cells["mpa"][k].images - cells["soup"][k].images).abs().max()) for k in (0, -1)]
print("largest difference of pixels between the rows, at the ends:", [f"{e:.1e}" for e in ends])

# %% [markdown]
# ## How much each reward moves
#
# The same with more images and without guidance, where members are the tilts they were tuned to be, per reward: blend,
# soup, members tuned for the preference, and the exact target, from tilted drawings.
#
# **What would falsify the next figures:** black dashes are where the blend should be. It may miss them by what members
# lack and by the blend's own error; a line that ran the other way would be a bug. The bars (two standard errors) are
# those of each mean by itself and mostly the spread between prompts, which all points share: `sdeblend evaluate
# bundled-images` has paired differences.

# %%
settings = {"each": MANY, "steps": STEPS, "guidance": 1.0}
many = {m: [draw_cell(pipe, members, pair(w), mode=m, **settings) for w in weights] for m in modes}
tuned = {0.25: "morl-25", 0.5: "morl-50", 0.75: "morl-75"}
tuned = {w: name for w, name in tuned.items() if w in weights}
oracles = load_members(pipe, {name: bundled_member(name) for name in tuned.values()})
oracle = [draw_cell(pipe, oracles, Preference({name: 1.0}), **settings) for name in tuned.values()]
drawings = draw_candidates(pipe, PROMPTS, count=CANDIDATES, generator=torch.Generator().manual_seed(0))


def target(vivid, reward):
    """Return the mean reward of the exact target: drawings tilted by exp(r(w) / alpha), caption by caption."""
    shares = {"compress": 1 - vivid, "vivid": vivid}
    total = sum(w / members[k].scales[k] * drawings.rewards[k].double() for k, w in shares.items())
    tilt = (total / members["vivid"].kl_weight).softmax(1)
    return float((tilt * drawings.rewards[reward].double()).sum(1).mean())


def curve(positions, cells, reward):
    """Return positions, means and standard errors of a reward."""
    means, errors = zip(*[cell.mean(reward) for cell in cells], strict=True)
    return positions, means, errors


for reward, unit in (("compress", "minus the JPEG size, kB"), ("vivid", "colourfulness")):
    lines = {NAMES[m]: curve(weights, many[m], reward) for m in modes}
    lines["tuned for the preference"] = curve(list(tuned), oracle, reward)
    lines["exact target"] = weights, [target(w, reward) for w in weights], None
    show(curves(lines, x="weight of vivid", y=unit, dashed=["exact target"]))
oracles.remove()

# %% [markdown]
# ## What the certificate says
#
# The members disagree, and the certificate adds up by how much along the way: in nats, without a reward call and
# without a further network call. It bounds the distance of the sampled chain to the geometric mean of the members'
# chains.
#
# **What would falsify the next figure:** at the ends only one member runs, so the certificate must be exactly zero
# there, and positive between them. Guidance multiplies what members disagree about, noise of their training included.

# %%
lines = {}
for name, found in (("guidance 1", many["mpa"]), (f"guidance {GUIDANCE:g}", cells["mpa"])):
    nats = [mean_and_error(cell.nats) for cell in found]
    lines[name] = weights, *zip(*nats, strict=True)
    print(name, "nats:", [f"{value:.3g} +- {error:.2g}" for value, error in nats])
show(curves(lines, x="weight of vivid", y="certificate, nats an image"))

# %% [markdown]
# ## Strength
#
# One member, DB-KLA: 0 is the base, 1 the member as tuned, 2 twice as far along the same direction.
#
# **It would be wrong if** the column of strength 0 were not the base's pictures (the same in both rows), or if a
# reward did not grow from 0 to 1. Above 1 certificates say little, since their weights have heavy tails
# (`03_strength`): none is shown.

# %%
strengths = [0.0, 1.0] if FAST else [0.0, 0.5, 1.0, 1.5, 2.0]
turned = [
    [draw_cell(pipe, members, Preference({name: 1.0}, strength=s), each=EACH, steps=STEPS) for s in strengths]
    for name in names
]
show(
    contact_sheet(
        [[cell.images for cell in line] for line in turned],
        rows=names,
        columns=[f"strength {s:g}" for s in strengths],
        notes=[[note(replace(cell, nats=None)) for cell in line] for line in turned],
        across=EACH,
    )
)
print("strength 0 agrees:", torch.equal(turned[0][0].images, turned[1][0].images))

# %% [markdown]
# ## One adapter a step
#
# DB-MPA-LS draws one member a step, so that a blend costs what one model costs.
#
# **It would be wrong if** the rewards of the last column left the others' by more than a few standard errors (at 50
# steps the draw adds a little noise), or if its evaluations were not half of DB-MPA's.

# %%
kinds = ["mpa", "soup", "ls"]
half = [draw_cell(pipe, members, pair(0.5), mode=m, each=EACH, steps=STEPS) for m in kinds]
show(
    contact_sheet(
        [[cell.images for cell in half]],
        rows=["weights 0.5, 0.5"],
        columns=[NAMES[m] for m in kinds],
        notes=[[f"{note(cell)}\n{cell.evaluations:g} evaluations an image" for cell in half]],
        across=EACH,
    )
)

# %% [markdown]
# ## Your own model: two lines change
#
# Nothing above knows that the model is small. For Stable Diffusion 1.5 or SDXL on a GPU, with LoRA files of your own:
#
# ```python
# pipe = StableDiffusionXLPipeline.from_pretrained(hub_id_or_folder, dtype=torch.float16).to("cuda")
# members = load_members(pipe, {"compress": "compress.safetensors", "vivid": "vivid.safetensors"})
# ```
#
# A third gives it noise, if its scheduler has none (Stable Diffusion 1.5 comes with PNDM, SDXL with Euler; without
# noise there is no certificate): `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`. Then
# `with blend(pipe, members, Preference({"compress": 0.3, "vivid": 0.7})) as knobs: pipe(prompt, eta=1.0)`. LoRA
# files from elsewhere do not say at which KL weight they were tuned: then weights and strength are knobs without
# units, and the certificate still says how much the members disagree. `07_your_own_members` tunes one whose KL weight
# is known.
