"""A run of ``sdeblend generate``: points of a sweep, each finished once, recorded in one file.

``run.json`` holds the settings (with a hash of every LoRA file), the versions and, for each finished point, its
coefficients, seeds, files, certificate and weights of the images. It is rewritten whole after every point, images
first, so that what it lists exists; a point it lists is not computed again.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from sdeblend.blend import Preference
from sdeblend.io import write_atomically
from stablediffusion.attach import blend
from stablediffusion.knobs import Knobs
from stablediffusion.lora import find_lora
from stablediffusion.members import load_members

_SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
}
_PACKAGES = ("sdeblend", "torch", "diffusers", "transformers", "peft")
_MARGIN = 14


class Run:
    """One folder of results.

    Args:
        settings: the command's options by name.
        points: weights by member name, one a point.
        out: the folder.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """

    def __init__(self, settings: dict[str, Any], points: list[dict[str, float]], out: Path) -> None:
        self.settings, self.points, self.out = settings, points, out
        self.files = {name: find_lora(source) for name, source in settings["member"].items()}
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()}
        wanted = {"settings": settings, "points": points, "members_sha256": hashes}
        self.record: dict[str, Any] = wanted | {"versions": {p: version(p) for p in _PACKAGES}, "results": {}}
        path = out / "run.json"
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in wanted if old.get(key) != json.loads(json.dumps(wanted[key]))]
            if changed:
                raise ValueError(f"{out} holds a run with other {' and '.join(changed)}; give another --out folder")
            done = {k: r for k, r in old["results"].items() if all((out / f).is_file() for f in r["files"])}
            self.record["results"] = done

    def finish(self) -> None:
        """Compute the points that are missing, then draw the contact sheet."""
        missing = [k for k in range(len(self.points)) if str(k) not in self.record["results"]]
        if missing:
            pipe = self._pipeline()
            members = load_members(pipe, self.files)
            total = len(missing) * self.settings["steps"]
            # None: no bar where the output is no terminal
            with tqdm(total=total, unit="step", disable=None) as bar:
                for k in missing:
                    self._finish_point(pipe, members, k, bar)
        write_atomically(self.out / "sheet.png", _png(self._sheet()))

    def _pipeline(self) -> Any:
        s = self.settings
        pipe = diffusers.DiffusionPipeline.from_pretrained(s["model"], dtype=getattr(torch, s["dtype"]))
        if s["scheduler"] != "keep" and hasattr(pipe.scheduler, "alphas_cumprod"):
            # clipping is a default of these classes and wrong on latents
            extra = {} if s["scheduler"] == "euler-a" else {"clip_sample": False}
            pipe.scheduler = _SCHEDULERS[s["scheduler"]].from_config(pipe.scheduler.config, **extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(s["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _finish_point(self, pipe: Any, members: Any, k: int, bar: tqdm) -> None:
        s = self.settings
        preference = Preference(self.points[k], s["strength"])
        correct = None if s["correct"] == "none" else s["correct"]
        if s["mode"] != "mpa" and correct == "certify":
            correct = None
        seeds = [s["seed"] + i for i in range(s["images"])]

        def tick(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            return values

        call = {
            "prompt": s["prompt"],
            "negative_prompt": s["negative"],
            "num_images_per_prompt": s["images"],
            "num_inference_steps": s["steps"],
            "guidance_scale": s["guidance"],
            "eta": s["eta"],
            "height": s["height"],
            "width": s["width"],
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "callback_on_step_end": tick,
        }
        known = inspect.signature(pipe.__call__).parameters
        with blend(pipe, members, preference, mode=s["mode"], correct=correct, seed=s["seed"]) as knobs:
            images = pipe(**{name: value for name, value in call.items() if name in known}).images
            result = _result(knobs)
        files = [f"point-{k:03d}-seed-{seed}.png" for seed in seeds]
        for name, image in zip(files, images, strict=True):
            write_atomically(self.out / name, _png(image))
        coefficients = preference.coefficients(members.names).tolist()
        named = dict(zip(("base", *members.names), coefficients, strict=True))
        self.record["results"][str(k)] = {"coefficients": named, "seeds": seeds, "files": files} | result
        write_atomically(self.out / "run.json", json.dumps(self.record, indent=2, allow_nan=False) + "\n")

    def _sheet(self) -> Image.Image:
        """Return one row a point, labelled with its weights, one column a seed."""
        rows = [self.record["results"][str(k)]["files"] for k in range(len(self.points))]
        images = [[Image.open(self.out / name) for name in row] for row in rows]
        width, height = images[0][0].size
        labels = ["  ".join(f"{name} {w:.3g}" for name, w in point.items()) for point in self.points]
        sheet = Image.new(
            "RGB", (max(width * len(rows[0]), 6 * max(map(len, labels))), (height + _MARGIN) * len(rows)), "white"
        )
        draw = ImageDraw.Draw(sheet)
        for r, (row, label) in enumerate(zip(images, labels, strict=True)):
            draw.text((1, r * (height + _MARGIN)), label, fill="black")
            for c, image in enumerate(row):
                sheet.paste(image, (c * width, r * (height + _MARGIN) + _MARGIN))
        return sheet


def _result(knobs: Knobs) -> dict[str, Any]:
    """Return what the knobs know of the last run, as JSON can hold it."""
    certificate, nats, weights = knobs.certificate, knobs.nats, knobs.log_weights
    if certificate is None or nats is None or weights is None:
        return {"certificate": None, "reason": knobs.reason}
    return {
        "certificate": {
            "nats": certificate.value,
            "standard_error": certificate.standard_error if len(nats) > 1 else None,
            "ess_fraction": certificate.ess_fraction,
            "per_image": nats.tolist(),
            "profile": certificate.profile.tolist(),
        },
        "log_weights": weights.tolist(),
        "resampled": knobs.resampled,
    }


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
