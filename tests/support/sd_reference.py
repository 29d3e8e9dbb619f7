"""The published algorithm written again for the tests: fused copies of the network, blend after guidance.

It shares no line with the package: LoRA files are read with safetensors and fused into deep copies, and the sampling
loop is spelled out with the scheduler's ``step``.
"""

from __future__ import annotations

import copy
import json

import torch
from safetensors import safe_open


def fused(module, path, prefix, weight=1.0):
    """Return a copy of ``module`` with ``weight`` times the LoRA's change added to its weights."""
    out = copy.deepcopy(module)
    layers = dict(out.named_modules())
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    scale = config[f"{prefix}.lora_alpha"] / config[f"{prefix}.r"]
    names = {"lora_A.weight": "lora_B.weight", "lora.down.weight": "lora.up.weight"}
    names |= {"lora_linear_layer.down.weight": "lora_linear_layer.up.weight"}
    used = 0
    for key, a in tensors.items():
        for down, up in names.items():
            if key.startswith(prefix + ".") and key.endswith(down):
                b = tensors[key.removesuffix(down) + up]
                layer = layers[key.removeprefix(prefix + ".").removesuffix("." + down)]
                delta = weight * scale * b @ a
                layer.weight.data += delta.to(layer.weight)
                used += 1
    assert used
    return out


def encode(pipe, prompt, negative, guided):
    """Return (positive, negative, pooled, negative pooled)."""
    name = type(pipe).__name__
    if name.startswith("Flux"):
        p = pipe.encode_prompt(prompt, None, max_sequence_length=16)
        n = pipe.encode_prompt(negative, None, max_sequence_length=16)
        return p[0], n[0], p[1], n[1]
    arguments = {"prompt": prompt, "device": "cpu", "num_images_per_prompt": 1, "negative_prompt": negative}
    arguments["do_classifier_free_guidance"] = guided
    if name.startswith("StableDiffusion3"):
        return pipe.encode_prompt(prompt_2=None, prompt_3=None, max_sequence_length=16, **arguments)
    out = pipe.encode_prompt(**arguments)
    return out if len(out) == 4 else (*out, None, None)


def predict(pipe, network, x, t, text, pooled):
    """Return unguided predictions, one a row of ``x``."""
    name = type(pipe).__name__
    if name.startswith("Flux"):
        side = int(x.shape[1] ** 0.5)
        ids = torch.zeros(side, side, 3, dtype=x.dtype)
        ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
        return network(
            hidden_states=x,
            timestep=t.expand(len(x)).to(x.dtype) / 1000,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=x.dtype),
        ).sample
    if name.startswith("StableDiffusion3"):
        return network(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t.expand(len(x))).sample
    added = None
    if pooled is not None:
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]], dtype=x.dtype)
        added = {"text_embeds": pooled, "time_ids": ids.expand(len(x), -1)}
    return network(x, t, encoder_hidden_states=text, added_cond_kwargs=added).sample


@torch.no_grad()
def published(pipe, networks, prompts, coefficients, x, *, steps, guidance, negative, generator):
    """Run base and members, blend after guidance, step; return the latents.

    networks and prompts (encoders' outputs) are one each of base and members.
    """
    flow = not hasattr(pipe.scheduler, "alphas_cumprod")
    scheduler = copy.deepcopy(pipe.scheduler)
    if type(pipe).__name__.startswith("Flux"):
        import numpy as np

        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        blended = torch.zeros_like(x)
        for network, (text, text_n, pooled, pooled_n), c in zip(networks, prompts, coefficients, strict=True):
            if guidance > 1:
                pools = None if pooled is None else torch.cat([pooled_n, pooled])
                empty, full = predict(pipe, network, torch.cat([x, x]), t, torch.cat([text_n, text]), pools).chunk(2)
                value = empty + guidance * (full - empty)
            else:
                value = predict(pipe, network, x, t, text, pooled)
            blended += c * value
        # the flow scheduler computes its step in float32 whatever the state is, so it must be diffusers' own here too
        noise = {} if flow else {"eta": 1.0, "generator": generator}
        x = scheduler.step(blended, t, x, **noise).prev_sample
    return x
