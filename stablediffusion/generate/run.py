"""A run of ``sdeblend generate``: points of a sweep, each finished once, recorded in one file.

``run.json`` holds the settings (with a hash of every LoRA file) and, for each finished point, its coefficients, seeds,
files, versions, and what the blend knows of its images: the certificate with its profile over the steps, both
effective sample sizes, log-weights, and the nats that each pair of members disagrees by at each step. Where a number
does not exist it is null. The file is rewritten whole after every point, images first, so that what it lists exists; a
point it lists is not computed again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from sdeblend.blend import Preference
from sdeblend.shell.console import Bar, progress
from sdeblend.shell.files import write_atomically
from sdeblend.shell.registry import versions
from stablediffusion.adapters.files import find_lora
from stablediffusion.adapters.members import load_members
from stablediffusion.blending.attach import blend
from stablediffusion.blending.knobs import Knobs
from stablediffusion.generate.command import BUNDLED
from stablediffusion.pipelines.loading import load_pipeline
from stablediffusion.small.files import MODEL, bundled_member

_SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
}
_PACKAGES = ("sdeblend", "torch", "diffusers", "transformers", "peft")


class Run:
    """One folder of results.

    Args:
        settings: the command's options by name.
        points: weights by member name, one a point.
        out: the folder.

    Raises:
        ValueError: if the folder holds a run with other settings, or a record that cannot be read.
    """

    def __init__(self, settings: dict[str, Any], points: list[dict[str, float]], out: Path) -> None:
        self.settings, self.points, self.out = settings, points, out
        self.files = {
            name: bundled_member(name) if source == BUNDLED else find_lora(source)
            for name, source in settings["member"].items()
        }
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()}
        wanted = {"settings": settings, "points": points, "members_sha256": hashes}
        self.record: dict[str, Any] = wanted | {"results": {}}
        path = out / "run.json"
        if path.exists():
            old = _read(path)
            changed = [key for key in wanted if old.get(key) != json.loads(json.dumps(wanted[key]))]
            if changed:
                raise ValueError(f"{out} holds a run with other {' and '.join(changed)}; give another --out folder")
            done = {k: r for k, r in old["results"].items() if all(_holds(out / f) for f in r["files"])}
            self.record["results"] = done

    def finish(self) -> None:
        """Compute the points that are missing, then draw the contact sheet."""
        missing = [k for k in range(len(self.points)) if str(k) not in self.record["results"]]
        if missing:
            self._check_device()
            pipe = self._pipeline()
            members = load_members(pipe, self.files)
            total = len(missing) * self.settings["steps"]
            with progress("images", total, unit="steps") as bar:
                for k in missing:
                    self._finish_point(pipe, members, k, bar)
        from sdeblend.shell.figures import encoded

        write_atomically(self.out / "sheet.png", encoded(self._sheet()))

    def _pipeline(self) -> Any:
        s = self.settings
        source = MODEL if s["model"] == BUNDLED else s["model"]
        pipe = load_pipeline(str(source), getattr(torch, s["dtype"]), what="--model")
        if s["scheduler"] != "keep" and hasattr(pipe.scheduler, "alphas_cumprod"):
            # clipping is a default of these classes and wrong on latents
            extra = {} if s["scheduler"] == "euler-a" else {"clip_sample": False}
            pipe.scheduler = _SCHEDULERS[s["scheduler"]].from_config(pipe.scheduler.config, **extra)
        return pipe.to(s["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _check_device(self) -> None:
        device = self.settings["device"]
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"--device must be one that torch can use here, got {device!r}; try cpu") from error

    def _finish_point(self, pipe: Any, members: Any, k: int, bar: Bar) -> None:
        from sdeblend.shell.figures import encoded

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
            write_atomically(self.out / name, encoded(image))
        coefficients = preference.coefficients(members.names).tolist()
        named = dict(zip(("base", *members.names), coefficients, strict=True))
        made_by = {"device": str(pipe.device), "versions": versions(_PACKAGES)}
        self.record["results"][str(k)] = {"coefficients": named, "seeds": seeds, "files": files} | made_by | result
        write_atomically(self.out / "run.json", json.dumps(self.record, indent=2, allow_nan=False) + "\n")

    def _sheet(self) -> Image.Image:
        """Return one row a point, labelled with its weights, one column a seed, under the settings they share."""
        from sdeblend.shell.figures import contact_sheet

        results = [self.record["results"][str(k)] for k in range(len(self.points))]
        s = self.settings
        # resampled images descend from others: a column is then no seed
        what = "image" if s["correct"] == "resample" else "seed"
        return contact_sheet(
            [[Image.open(self.out / name) for name in result["files"]] for result in results],
            rows=["\n".join(f"{name} {w:.3g}" for name, w in point.items()) for point in self.points],
            columns=[f"{what} {seed}" for seed in results[0]["seeds"]],
            title=f"{s['prompt']}\nmode {s['mode']}, strength {s['strength']:g}, guidance {s['guidance']:g}",
            zoom=1,
        )


def _result(knobs: Knobs) -> dict[str, Any]:
    """Return what the knobs know of the last run, as JSON can hold it."""
    certificate, nats, weights = knobs.certificate, knobs.nats, knobs.log_weights
    ess, pairs = knobs.ess, knobs.disagreement
    if certificate is None or nats is None or weights is None or ess is None or pairs is None:
        return {"certificate": None, "reason": knobs.reason, "notes": list(knobs.notes)}
    names = ("base", *knobs.members.names)
    return {
        "certificate": {
            "nats": _finite(certificate.value),
            "standard_error": _finite(certificate.standard_error),
            "normalised": certificate.normalised,
            "reliable": certificate.reliable,
            "warning": certificate.warning,
            "per_image": nats.tolist(),
            "profile": certificate.profile.tolist(),
            "disagreement": {
                f"{names[i]} | {names[j]}": (2 * pairs[:, i, j]).tolist()
                for i in range(len(names))
                for j in range(i + 1, len(names))
            },
        },
        "effective_samples": {name: _finite(value) for name, value in ess._asdict().items()},
        "log_weights": weights.tolist(),
        "resampled": knobs.resampled,
        "notes": list(knobs.notes),
    }


def _finite(value: float) -> float | None:
    """Return the number, or None where it does not exist: JSON knows no infinity."""
    return value if math.isfinite(value) else None


def _holds(path: Path) -> bool:
    """Return whether a file is there and not empty."""
    return path.is_file() and path.stat().st_size > 0


def _read(path: Path) -> dict[str, Any]:
    """Return an earlier record, or raise a ValueError if the file is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(result["files"], list) for result in record["results"].values()):
            return record
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} must be a record of this command, got something else; move it, or give another --out")
