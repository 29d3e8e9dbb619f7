"""A blend as a guider of diffusers, for modular pipelines: it runs the members where guiders run conditions.

    pipe.update_components(guider=BlendGuidance(ClassifierFreeGuidance(7.5), {"compress": 0.3, "vivid": 0.7}))
    image = pipe(prompt="a red circle", output="images")[0]

A guider turns one step into a batch a condition (prompt, negative prompt, perturbed attention, ...), lets the pipeline
run the denoiser on each, and makes one prediction of them. This one holds another, repeats each of its batches once a
member with that member's adapter active, and gives it the members' average for each condition,

    pred_j = c_0 base_j + sum_i c_i member_ij,      sum c = 1,

so that whatever the inner guider does acts on the blend.

Source: Diffusion Blend 2505.18547, Algorithms 1 and 2; guiders: diffusers.guiders.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import guiders
from diffusers.guiders import BaseGuidance
from torch import Tensor, nn

from sdeblend import Preference
from sdeblend.blend import combine
from stablediffusion.adapters.switch import AdapterSwitch, check_unfused
from stablediffusion.blending.attach import check_free
from stablediffusion.blending.patches import patched_forward

_HALF = (torch.float16, torch.bfloat16)

Weights = Preference | Mapping[str, float]


class BlendGuidance(BaseGuidance):
    """Blends adapters on a modular pipeline, inside any guider of diffusers.

    The numbers are those of ``stablediffusion.blend``, which works on every pipeline and has what this lacks:
    certificates and correction, one member a step ("ls"), adapters side by side, whole networks as members, and
    adapters of text encoders (here they stay as they are). What this has: it is a component of the pipeline, saved with
    ``save_pretrained`` and loaded with ``from_pretrained``, its inner guider with it.

    Members are named as the adapters that are loaded on the denoiser; those not named stay as they are, for all.
    Outside the denoiser's calls nothing is switched. ``disable()`` turns the inner guider off, not the blend; other
    attributes are the inner guider's. A pipeline of two denoisers (Wan 2.2) has two guiders, and needs a blend in each.

    Args:
        guider: what acts on the blended predictions, e.g. ``ClassifierFreeGuidance()``.
        preference: weights by adapter name, and the strength; the base takes the rest of one. A weight may be an array
            (B,), one an image. Or preferences by the fraction of the run from which they hold, counted as guiders
            count ``start``: ``{0.0: {"layout": 1.0}, 0.6: {"style": 1.0}}``.

    Raises:
        TypeError: a guider or a preference that is none.
        ValueError: weights without names, fractions that do not begin at 0; a blend as inner guider. In a run: an
            adapter that is not loaded or is fused, a cache, a denoiser that is blended or compiled in place, weights
            for another number of images.
    """

    def __init__(
        self,
        guider: BaseGuidance | Mapping[str, Any],
        preference: Weights | Mapping[float, Weights] | Mapping[str, Any],
    ) -> None:
        self.guider = guider
        self._input_predictions = self.guider._input_predictions
        super().__init__(enabled=self.guider._enabled)
        self.preference = preference
        self._undo = ExitStack()
        self._adapters: list[tuple[str, ...]] = []
        self._coefficients = torch.ones(0)
        self._before = 0

    @property
    def guider(self) -> BaseGuidance:
        """What acts on the blended predictions; assign to exchange it."""
        return self._guider

    @guider.setter
    def guider(self, guider: Any) -> None:
        self._guider = _guider(guider)
        self.register_to_config(guider=json.loads(self._guider.to_json_string()))

    @property
    def preference(self) -> Preference | dict[float, Preference]:
        """The weights and the strength, or these by fraction of the run; assign to change them from the next step."""
        return self._plan[0.0] if len(self._plan) == 1 else dict(self._plan)

    @preference.setter
    def preference(self, preference: Any) -> None:
        plan = _plan(preference)
        saved = {str(fraction): part.to_json() for fraction, part in plan.items()}
        self.register_to_config(preference=saved if len(saved) > 1 else saved["0.0"])
        self._plan = plan
        self._switches: dict[nn.Module, AdapterSwitch] = {}

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Begin a step of a run, and read what is loaded anew if it is the first."""
        if self._step is None or step <= self._step:
            self._switches = {}
        super().set_state(step, num_inference_steps, timestep)
        self.guider.set_state(step, num_inference_steps, timestep)

    def get_state(self) -> dict[str, Any]:
        """Return the inner guider's state, and what is blended at this step."""
        return self.guider.get_state() | {"preference": self._preference_now()}

    def prepare_inputs(self, data: Any) -> list[Any]:
        """Return the inner guider's batches, each once a member."""
        return self._repeated(self.guider.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """Return the inner guider's batches, each once a member."""
        return self._repeated(self.guider.prepare_inputs_from_block_state(data, input_fields))

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Let the next call of the denoiser run one member, and the inner guider see one condition."""
        self._undo.close()
        adapters = self._adapters[self._count_prepared % len(self._adapters)]
        switch = self._switches.get(denoiser) or self._switch(denoiser)
        # the inner guider counts conditions, and hooks layers by that count: to it a condition comes once
        if self._count_prepared % len(self._adapters) == 0:
            self._before = self.guider._count_prepared
        self.guider._count_prepared = self._before
        super().prepare_models(denoiser)
        self.guider.prepare_models(denoiser)

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                with switch.borrowed():
                    switch.use(*adapters)
                    return original(*args, **kwargs)
            except BaseException:  # pipelines clean up after calls that return
                self.cleanup_models(denoiser)
                raise

        self._undo.enter_context(patched_forward(denoiser, forward))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Leave the denoiser as it was before ``prepare_models``."""
        self._undo.close()
        self.guider.cleanup_models(denoiser)

    def __call__(self, data: list[Any]) -> Any:
        """Return what the inner guider makes of the members' averages."""
        members, conditions = len(self._adapters), self.num_conditions
        if len(data) != members * conditions or not all(hasattr(batch, "noise_pred") for batch in data):
            raise ValueError(
                f"a blend of {members} networks needs predictions of all its {members * conditions} batches, got "
                f"{sum(hasattr(batch, 'noise_pred') for batch in data)} of {len(data)}; this pipeline runs its guider "
                "in a way of its own, use stablediffusion.blend on it"
            )
        averages = []
        for start in range(0, len(data), members):
            average = copy.copy(data[start])
            average.noise_pred = _average([b.noise_pred for b in data[start : start + members]], self._coefficients)
            averages.append(average)
        return self.guider(averages)

    def disable(self) -> None:
        """Turn the inner guider off; the blend stays."""
        self.guider.disable()

    def enable(self) -> None:
        """Turn the inner guider on."""
        self.guider.enable()

    @property
    def is_conditional(self) -> bool:
        """Whether the condition that is being run is a prompt."""
        return self.guider.is_conditional

    @property
    def num_conditions(self) -> int:
        """How many conditions the inner guider has; each is run once a member."""
        return self.guider.num_conditions

    @property
    def _enabled(self) -> bool:
        return self.guider._enabled

    @_enabled.setter
    def _enabled(self, enabled: bool) -> None:
        self.guider._enabled = enabled

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._guider, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # pipelines and users read and set what the guider of a pipeline has, such as its scale
        own = name.startswith("_") or hasattr(type(self), name) or not hasattr(self._guider, name)
        super().__setattr__(name, value) if own else setattr(self._guider, name, value)

    def _preference_now(self) -> Preference:
        """Return the preference at the present step."""
        steps, step = self._num_inference_steps or 0, self._step or 0
        return self._plan[max(fraction for fraction in self._plan if int(fraction * steps) <= step)]

    def _repeated(self, batches: Sequence[Any]) -> list[Any]:
        """Return each batch once a member, after deciding which members this step has."""
        preference = self._preference_now()
        every = [(), *((name,) for name in preference.names or ())]
        coefficients = preference.coefficients()
        used = (coefficients != 0).reshape(-1, len(every)).any(0).nonzero().flatten().tolist()
        self._adapters, self._coefficients = [every[k] for k in used], coefficients[..., used]
        return [copy.copy(batch) for batch in batches for _ in used]

    def _switch(self, denoiser: nn.Module) -> AdapterSwitch:
        """Return what activates the members of this run on a denoiser, or raise if something is in the way."""
        names = dict.fromkeys(name for part in self._plan.values() for name in part.names or ())
        switch = AdapterSwitch([denoiser], names)
        check_free("denoiser", denoiser)
        check_unfused(denoiser, [denoiser])
        holders = [getattr(layer, name, {}) for layer in switch.layers for name in layer.adapter_layer_names]
        loaded = {name for holder in holders for name in holder}
        if missing := [name for name in names if name not in loaded]:
            raise ValueError(
                f"a blend can weigh adapters that are loaded on the {type(denoiser).__name__}, "
                f"{', '.join(sorted(loaded)) or 'none here'}, got {', '.join(missing)}; load them with their "
                "adapter_name, or drop them"
            )
        self._switches[denoiser] = switch
        return switch


def _average(values: list[Any], coefficients: Tensor) -> Any:
    """Return the members' average of predictions: a tensor, or such in lists and tuples."""
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, Tensor):
        if coefficients.ndim == 2 and len(coefficients) != len(first):
            raise ValueError(f"weights for {len(coefficients)} images need a batch of as many, got {len(first)}")
        members = torch.stack(values)
        return combine(members.float() if first.dtype in _HALF else members, coefficients).to(first.dtype)
    if not isinstance(first, list | tuple):
        raise TypeError(f"a blend needs predictions as tensors, or lists of them, got {type(first).__name__}")
    if coefficients.ndim == 2:
        raise ValueError("weights an image need predictions as one tensor, got a list; give one weight a member")
    return type(first)(_average(list(parts), coefficients) for parts in zip(*values, strict=True))


def _guider(guider: Any) -> BaseGuidance:
    """Return the inner guider, from its configuration if that is given."""
    if isinstance(guider, Mapping):
        name = str(guider.get("_class_name"))
        kinds: dict[str, Any] = {
            name: kind
            for name, kind in vars(guiders).items()
            if isinstance(kind, type) and issubclass(kind, BaseGuidance)
        }
        if name not in kinds:
            raise ValueError(
                f"a blend loads inner guiders that diffusers has, got {name!r}; give from_pretrained one as guider=..."
            )
        return kinds[name].from_config(dict(guider))
    if not isinstance(guider, BaseGuidance):
        raise TypeError(
            f"a blend needs a guider of diffusers around its members, got {type(guider).__name__}; give "
            "ClassifierFreeGuidance(guidance_scale=1.0) for no guidance"
        )
    if isinstance(guider, BlendGuidance):
        raise ValueError(
            "a blend inside a blend is one blend, got one as inner guider; put all weights in one preference"
        )
    return guider


def _plan(preference: Any) -> dict[float, Preference]:
    """Return preferences by the fraction of the run from which they hold, in order."""
    parts: Mapping[Any, Any] = {0.0: preference}
    if isinstance(preference, Mapping) and preference and "weights" not in preference:
        timed = all(isinstance(value, Preference | Mapping) for value in preference.values())
        parts = preference if timed else parts
    try:
        plan = {fraction: parts[key] for fraction, key in sorted((float(key), key) for key in parts)}
    except ValueError:
        plan = {}
    if not plan or min(plan) != 0 or max(plan) >= 1:
        raise ValueError(
            "preferences over a run need the fraction from which each holds, 0 first and all below 1, got "
            f"{', '.join(map(str, parts))}; give {{0.0: first, 0.5: second}}"
        )
    return {fraction: _preference(part) for fraction, part in plan.items()}


def _preference(value: Any) -> Preference:
    """Return a preference by names, from weights or from what ``Preference.to_json`` wrote."""
    if isinstance(value, Mapping):
        saved = isinstance(value.get("weights"), Mapping)
        value = Preference.from_json(value) if saved else Preference(value)
    if not isinstance(value, Preference):
        raise TypeError(f"a blend needs a preference or weights by name, got {value!r}; give {{'adapter': weight}}")
    if value.names is None:
        raise ValueError("a guider finds adapters by their names, got weights in order; give {'adapter': weight}")
    return value
