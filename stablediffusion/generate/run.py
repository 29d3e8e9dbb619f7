"""A run of ``sdeblend generate``: points of a sweep, each finished once, recorded in one file.

``run.json`` holds the settings (with a hash of every LoRA file) and, for each finished point, its coefficients, seeds,
files, versions, and what the blend knows of its images: the certificate with its profile over the steps, both
effective sample sizes, log-weights, and the nats that each pair of members disagrees by at each step. Where a number
does not exist it is null. The file is rewritten whole after every point, images first, so that what it lists exists; a
point it lists is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from sdeblend.shell.console import Bar, progress
from sdeblend.shell.files import write_atomically
from sdeblend.shell.registry import versions
from stablediffusion.adapters.files import find_lora
from stablediffusion.adapters.members import Members, load_members
from stablediffusion.blending.attach import blend
from stablediffusion.blending.knobs import Knobs
from stablediffusion.generate.options import BUNDLED, Options
from stablediffusion.pipelines.families import call_parameters, draws_from_text
from stablediffusion.pipelines.flow_ancestral import FlowAncestral
from stablediffusion.pipelines.inputs import call_guidance
from stablediffusion.pipelines.loading import load_pipeline
from stablediffusion.pipelines.schedulers import is_flow
from stablediffusion.small.files import MODEL, bundled_member

_SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
}
_PACKAGES = ("sdeblend", "torch", "diffusers", "transformers", "peft")


def _scheduler(pipe: Any, sampler: str, eta: float) -> Any:
    """Return the scheduler that ``--sampler`` asks for, from the settings of the pipeline's own."""
    config, flow, table = pipe.scheduler.config, is_flow(pipe.scheduler), hasattr(pipe.scheduler, "alphas_cumprod")
    fitting = ["flow-ancestral"] if flow else list(_SCHEDULERS) if table else []
    if sampler == "auto":
        sampler = "ddim" if "ddim" in fitting else "keep"
    if sampler == "keep":
        return pipe.scheduler
    if sampler not in fitting:
        raise ValueError(
            f"--sampler must suit the model's {type(pipe.scheduler).__name__}, got {sampler}; "
            f"give {' or '.join([*fitting, 'keep'])}"
        )
    if flow:
        # what a multistep scheduler calls its shift
        more = {"shift": config["flow_shift"]} if "flow_shift" in config and "shift" not in config else {}
        return FlowAncestral.from_config(config, eta=eta, **more)
    # clipping is a default of these classes and wrong on latents
    return _SCHEDULERS[sampler].from_config(config, **({} if sampler == "euler-a" else {"clip_sample": False}))


class Run:
    """One folder of results.

    Args:
        options: of the command.
        out: the folder.

    Raises:
        ValueError: if the folder holds a run with other settings, or a record that cannot be read.
    """

    def __init__(self, options: Options, out: Path) -> None:
        self.options, self.preferences, self.out = options, options.preferences, out
        self.files = {
            name: bundled_member(name) if source == BUNDLED else find_lora(source)
            for name, source in options.member.items()
        }
        wanted: dict[str, Any] = {
            "settings": options.model_dump(mode="json", exclude={"sweep", "weights", "out"}),
            "points": [preference.weights for preference in self.preferences],
            "members_sha256": {k: hashlib.sha256(path.read_bytes()).hexdigest() for k, path in self.files.items()},
        }
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
        missing = [k for k in range(len(self.preferences)) if str(k) not in self.record["results"]]
        if missing:
            pipe = self._pipeline()
            members = load_members(pipe, self.files)
            with progress("images", len(missing) * self.options.steps, unit="steps") as bar:
                for k in missing:
                    self._finish_point(pipe, members, k, bar)
        write_atomically(self.out / "sheet.png", self._sheet())

    def _pipeline(self) -> Any:
        o = self.options
        try:
            torch.empty(0, device=o.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"--device must be one that torch can use here, got {o.device!r}; try cpu") from error
        source = MODEL if o.model == BUNDLED else o.model
        pipe = load_pipeline(str(source), getattr(torch, o.dtype), what="--model")
        draws_from_text(pipe, "--model")
        pipe.scheduler = _scheduler(pipe, o.sampler, o.eta)
        return pipe.to(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _finish_point(self, pipe: Any, members: Members, k: int, bar: Bar) -> None:
        from sdeblend.shell.figures import encoded

        o, preference = self.options, self.preferences[k]
        correct = None if o.correct == "none" or (o.mode != "mpa" and o.correct == "certify") else o.correct
        seeds = [o.seed + i for i in range(o.images)]

        def tick(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            return values

        call = {
            "prompt": o.prompt,
            "num_images_per_prompt": o.images,
            "num_inference_steps": o.steps,
            "eta": o.eta,
            "height": o.height,
            "width": o.width,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "callback_on_step_end": tick,
        }
        known = call_parameters(pipe)
        guidance, negated = call_guidance(pipe, o.guidance)
        negated = negated and "negative_prompt" in known
        if o.negative and not negated:
            scales = ", ".join(f"{name}={value:g}" for name, value in guidance.items()) or "no guidance"
            raise ValueError(
                f"--negative needs a pipeline that takes it, got {type(pipe).__name__} with {scales}; drop it"
            )
        call = {name: value for name, value in call.items() if name in known} | guidance
        # without any, pipelines have something of their own in its place, but true_cfg_scale does nothing
        call |= {"negative_prompt": o.negative} if negated and (o.negative or "true_cfg_scale" in guidance) else {}
        with blend(pipe, members, preference, mode=o.mode, correct=correct, seed=o.seed) as knobs:
            images = pipe(**call).images
            result = _result(knobs)
        files = [f"point-{k:03d}-seed-{seed}.png" for seed in seeds]
        for name, image in zip(files, images, strict=True):
            write_atomically(self.out / name, encoded(image))
        coefficients = preference.coefficients(members.names).tolist()
        named = dict(zip(("base", *members.names), coefficients, strict=True))
        made_by = {"device": str(pipe.device), "versions": versions(_PACKAGES), "guidance": guidance}
        self.record["results"][str(k)] = {"coefficients": named, "seeds": seeds, "files": files} | made_by | result
        write_atomically(self.out / "run.json", json.dumps(self.record, indent=2, allow_nan=False) + "\n")

    def _sheet(self) -> bytes:
        """Return one row a point, labelled with its weights, one column a seed, under the settings they share."""
        from sdeblend.shell.figures import contact_sheet, encoded

        o, results = self.options, [self.record["results"][str(k)] for k in range(len(self.preferences))]
        # resampled images descend from others: a column is then no seed
        what = "image" if o.correct == "resample" else "seed"
        scales = [f"{name.replace('_', ' ')} {value:g}" for name, value in results[0].get("guidance", {}).items()]
        sheet = contact_sheet(
            [[Image.open(self.out / name) for name in result["files"]] for result in results],
            rows=["\n".join(f"{name} {w:.3g}" for name, w in point.items()) for point in self.record["points"]],
            columns=[f"{what} {seed}" for seed in results[0]["seeds"]],
            title=", ".join([f"{o.prompt}\nmode {o.mode}", f"strength {o.strength:g}", *scales]),
            zoom=1,
        )
        return encoded(sheet)


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
