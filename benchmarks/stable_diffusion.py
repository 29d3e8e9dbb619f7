"""Cost of blending on a pipeline; ``python -m benchmarks.stable_diffusion``.

On a CPU: whole pipeline runs with a mid-size random UNet, against the same pipeline with one LoRA active, one thread.
On a CUDA device, where there is one: a UNet of Stable Diffusion 1.5's size with random weights in bfloat16, against the
base (the paper reports 2.03 for two members and 1.03 for one member a step). LoRA rank 4 on attention; weights sum
to one, so the base is not evaluated.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance

from benchmarks.timing import Race, race, save
from sdeblend import Preference
from stablediffusion import BlendGuidance, Members, blend, load_members
from stablediffusion.testing import mid_size_unet, sd15_size_unet, tiny_lora, tiny_modular, tiny_pipeline
from stablediffusion.testing.networks import seeded

Row = dict[str, Any]
Candidates = dict[str, Callable[[], object]]


def pipeline(unet: Any, members: int, folder: Path, device: str, dtype: torch.dtype) -> tuple[Any, Members]:
    """Return a tiny pipeline around ``unet`` with random LoRA members."""
    pipe = tiny_pipeline("sd15")
    if unet.config.cross_attention_dim != pipe.text_encoder.config.hidden_size:
        from stablediffusion.testing.text import clip_encoder

        with seeded(0):
            pipe.text_encoder = clip_encoder(unet.config.cross_attention_dim).eval()
    pipe.unet = unet.eval().requires_grad_(False)
    paths = {f"m{i}": tiny_lora(pipe, folder / f"{i}.safetensors", seed=i) for i in range(members)}
    loaded = load_members(pipe, paths)
    return pipe.to(device, dtype), loaded


def sampler(pipe: Any, steps: int) -> Callable[[], None]:
    """Return a run of ``steps`` DDIM steps with guidance on latents of the UNet's own size."""

    def run() -> None:
        pipe(
            "a red circle",
            num_inference_steps=steps,
            eta=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def blended(pipe: Any, members: Members, count: int, run: Callable[[], None], **options: Any) -> Callable[[], None]:
    """Return the same run under a blend of the first ``count`` members."""
    preference = Preference({f"m{i}": 1 / count for i in range(count)})

    def candidate() -> None:
        with blend(pipe, members, preference, **options):
            run()

    return candidate


def one_lora(pipe: Any, run: Callable[[], None]) -> Callable[[], None]:
    """Return the run with one LoRA active, without a blend."""

    def candidate() -> None:
        pipe.unet.set_adapter("m0")
        run()

    return candidate


def on_cpu(folder: Path) -> list[Row]:
    """Race DB-MPA and DB-MPA-LS of 2, 3 and 4 members against one LoRA."""
    pipe, members = pipeline(mid_size_unet(), 4, folder, "cpu", torch.float32)
    run = sampler(pipe, 4)
    candidates: Candidates = {"one": one_lora(pipe, run)}
    for m in (2, 3, 4):
        candidates[f"mpa {m}"] = blended(pipe, members, m, run)
        candidates[f"ls {m}"] = blended(pipe, members, m, run, mode="ls")
    candidates["side by side 2"] = blended(pipe, members, 2, run, batched=True)
    candidates["soup 2"] = blended(pipe, members, 2, run, mode="soup")
    # CPU seconds: a run takes seconds on one thread, which other processes stretch and do not lengthen.
    result = race(candidates, rounds=5, clock=time.process_time)
    rows = []
    for m in (2, 3, 4):
        rows.append(_row(result, f"DB-MPA, {m} members", f"mpa {m}", "one", m, aim=1.05))
        rows.append(_row(result, f"DB-MPA-LS, {m} members", f"ls {m}", "one", 1, aim=1.05))
    rows.append(_row(result, "DB-MPA, 2 members side by side", "side by side 2", "one", 2))
    rows.append(_row(result, "exact soup, 2 members", "soup 2", "one", 1))
    rows.append(guiding(folder))
    rows.append(switching(members))
    return rows


def guiding(folder: Path, channels: tuple[int, int] = (128, 256), steps: int = 4, rounds: int = 5) -> Row:
    """Race two members in the guider of a modular pipeline against the same blend attached to it."""
    pipe = tiny_modular("sdxl")
    sizes = {"sample_size": 32, "block_out_channels": channels, "attention_head_dim": (8, 8)}
    with seeded(0):
        unet = type(pipe.unet).from_config(dict(pipe.unet.config) | sizes)
    pipe.update_components(unet=unet.eval().requires_grad_(False))
    members = load_members(pipe, {f"m{i}": tiny_lora(pipe, folder / f"xl{i}.safetensors", seed=i) for i in range(2)})
    halves, plain = Preference({"m0": 0.5, "m1": 0.5}), ClassifierFreeGuidance(7.5)

    def run(guider: Any) -> None:
        pipe.update_components(guider=guider)
        call = {"height": 64, "width": 64, "num_inference_steps": steps, "output": "latents"}
        pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), **call)

    candidates: Candidates = {
        "guider": lambda: run(BlendGuidance(plain, halves)),
        "blend": blended(pipe, members, 2, lambda: run(plain), correct=None),
    }
    result = race(candidates, rounds=rounds, clock=time.process_time)
    return _row(result, "BlendGuidance, 2 members, modular pipeline", "guider", "blend", 1, aim=1.05)


def switching(members: Members) -> Row:
    """Time one switch of the active adapter."""
    with members.switch.borrowed() as switch:

        def thousand() -> None:
            for k in range(1000):
                switch.use(f"m{k % len(members)}")

        seconds = race({"switch": thousand}).median("switch")
    return {
        "what": f"switching an adapter, {len(switch.layers)} layers",
        "value": seconds * 1e3,  # microseconds a switch
        "unit": "us",
        "aim": "< 1000",
        "met": seconds * 1e3 < 1000,
    }


def on_gpu(folder: Path, device: str = "cuda", unet: Callable[[], Any] = sd15_size_unet, steps: int = 20) -> list[Row]:
    """Race base, DB-MPA of two members (switched and side by side, eager and compiled) and LS."""
    pipe, members = pipeline(unet(), 2, folder, device, torch.bfloat16)
    run, rows = sampler(pipe, steps), []
    plain = pipe.unet
    for kind in ("eager", "compiled"):
        pipe.unet = plain if kind == "eager" else torch.compile(plain)
        with members.switch.borrowed():
            candidates: Candidates = {
                "base": run,
                "mpa": blended(pipe, members, 2, run, batched=False),
                "side by side": blended(pipe, members, 2, run, batched=True),
                "ls": blended(pipe, members, 2, run, mode="ls"),
            }
            result = race(candidates)
        rows.append(_row(result, f"DB-MPA, 2 members switched, {kind}", "mpa", "base", 1))
        rows.append(_row(result, f"DB-MPA, 2 members side by side, {kind}", "side by side", "base", 1))
        rows.append(_row(result, f"DB-MPA-LS, 2 members, {kind}", "ls", "base", 1))
    pipe.unet = plain
    return rows


def _row(result: Race, what: str, name: str, against: str, forwards: int, aim: float | None = None) -> Row:
    ratio, low, high = (value / forwards for value in result.ratio(name, against))
    unit = "x" if forwards == 1 else f"x {forwards} forwards"
    row: Row = {"what": what, "value": ratio, "unit": unit}
    if aim is not None:
        row |= {"aim": f"<= {aim:g}", "met": ratio <= aim}
    return row | {"detail": f"against {against}, {result.median(against):.3g} s; {low:.3f} to {high:.3f}"}


def main() -> None:
    """Run what this machine can and write ``benchmarks/results/stable_diffusion.{json,md}``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = on_cpu(Path(folder))
        if torch.cuda.is_available():
            rows += on_gpu(Path(folder))
    save("stable_diffusion", rows)


if __name__ == "__main__":
    main()
