"""The methods that are compared: how each samples a case, where it is from, what it costs.

All run on the case's own grid and step, from the same start and step noise of a seed (``draws``). Cost is counted,
not assumed: forward passes of one member a returned sample, how many of them are differentiated too, and evaluations
of r(w). A method that cannot serve a case says why in one phrase, and is left out of that part of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor

from sdeblend.baselines.drawn import Drawn
from sdeblend.baselines.guidance import RewardGuidance, tempered
from sdeblend.baselines.interpolation import pairwise, quadratic_strength
from sdeblend.baselines.search import best_of_n, code
from sdeblend.baselines.steering import steer
from sdeblend.baselines.union import sample_union
from sdeblend.blend import Blend
from sdeblend.config import Spec
from sdeblend.correct import Correction, CorrectionMode
from sdeblend.evaluate.backend import Case, Wanted
from sdeblend.evaluate.draws import Draws
from sdeblend.score import ScoreFunction, restrict_rows
from sdeblend.sde import BackwardSDE
from sdeblend.select import OneMemberPerStep, Selection
from sdeblend.solve import solve

Options = Mapping[str, Any]
Sampler = Callable[[Case, Wanted, Draws, Options], Drawn]


class NotApplicable(Exception):
    """A method does not serve a case; the message is the reason, one phrase."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        label: what people call it.
        sample: (case, wanted, draws, options) -> samples and cost.
        source: where it is from.
        cost: calls of one model a step and what else, in words; K members of non-zero coefficient.
        options: the keys of its ``[methods.NAME]`` table.
        aims: whether p_base exp(lambda r(w) / alpha), which all samples are measured against, is its limit as steps and
            particles grow and members are exact, or its stated approximation; False for methods of another law by
            construction.
    """

    label: str
    sample: Sampler
    source: str
    cost: str
    options: Spec = field(default_factory=dict)
    aims: bool = True


def _run(case: Case, score: ScoreFunction, draws: Draws, correct: Correction | None = None) -> Drawn:
    """Solve the backward SDE of a score; with a correction, weights, certificate and ancestors come with it."""
    x = draws.start(case.like, case.schedule.prior_std())
    sde = BackwardSDE(case.schedule, score)
    end = solve(sde, x, case.grid, step=case.step, noise=draws.noise(), correct=correct)
    calls = end.evaluations if isinstance(score, Blend) else float(len(case.grid) - 1) * case.step.evaluations
    if end.certificate is None:
        return Drawn(end.samples, calls)
    certificate = end.certificate
    facts = {
        "certificate": certificate.value,
        "certificate_se": certificate.standard_error,
        "ess": certificate.ess_fraction,
        "log_normalizer": end.log_normalizers[0][0],
    }
    return Drawn(
        end.samples,
        calls,
        log_weights=end.log_weights,
        ancestors=end.ancestors,
        facts=facts,
    )


def _coefficients(wanted: Wanted, coefficients: Tensor | None = None) -> Tensor:
    c = wanted.coefficients if coefficients is None else coefficients
    if bool((c < 0).any()):
        raise NotApplicable("one member a step needs coefficients that are probabilities")
    return c


def _base(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
    c = torch.zeros(1 + len(case.names), dtype=torch.float64)
    c[0] = 1
    return _run(case, Blend(case.stack(len(draws)), c), draws)


def _single(role: str, missing: str) -> Sampler:
    def sample(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
        score = case.score(role, wanted, len(draws))
        if score is None:
            raise NotApplicable(missing)
        return _run(case, score, draws)

    return sample


def _blend(mode: CorrectionMode, *, weighted: bool = False) -> Sampler:
    def sample(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
        correct = None
        if case.step.stochastic:
            correct = Correction(mode, generator=draws.generator("ancestors"), **options)
        elif weighted:
            raise NotApplicable("a correction needs a solver with noise")
        drawn = _run(case, Blend(case.stack(len(draws)), wanted.coefficients), draws, correct)
        if weighted:
            return drawn
        return Drawn(drawn.samples, drawn.model_calls, facts=drawn.facts)

    return sample


def _kla(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
    if sum(w != 0 for w in wanted.weights.values()) != 1:
        raise NotApplicable("it blends the base with one member; see DB-MPA for more")
    return _blend("certify")(case, wanted, draws, options)


def _one_member(selection: Selection, *, equal: bool = False) -> Sampler:
    def sample(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
        c = _coefficients(wanted, _equal(wanted) if equal else None)
        score = OneMemberPerStep(
            case.stack(len(draws)),
            c,
            case.grid,
            len(draws),
            method=selection,
            generator=draws.generator("members"),
        )
        return _run(case, score, draws)

    return sample


def _equal(wanted: Wanted) -> Tensor:
    """Return equal coefficients of the members that have a weight, (1 + m,)."""
    used = torch.tensor([0.0, *[float(w != 0) for w in wanted.weights.values()]], dtype=torch.float64)
    if not bool(used.any()):
        raise NotApplicable("it needs a member with a weight other than 0")
    return used / used.sum()


def _composite(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
    return _run(case, Blend(case.stack(len(draws)), _equal(wanted)), draws)


def _over_time(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
    """Equal weights in noise, the preference in data, and the share of noise in the variance between them."""
    first, last = wanted.strength * _equal(wanted), wanted.coefficients

    def rule(t: Tensor) -> Tensor:
        share = torch.sigmoid(-case.schedule.log_snr(t)).item()
        members = share * first[1:] + (1 - share) * last[1:]
        return torch.cat([1 - members.sum(0, keepdim=True), members])

    return _run(case, Blend(case.stack(len(draws)), rule), draws)


def _higher_order(role: str) -> Sampler:
    def sample(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
        if role == "pairs":
            if abs(sum(wanted.weights.values()) - 1) > 1e-6 or wanted.strength != 1:
                raise NotApplicable("it is an expansion about weights that sum to 1 at strength 1")
            named = pairwise(wanted.weights)
        else:
            shares = quadratic_strength(wanted.strength)
            named = {f"{k}:{name}": w * shares[k] for name, w in wanted.weights.items() for k in ("half", "full")}
        found = case.higher_order(role, wanted, len(draws))
        if found is None:
            raise NotApplicable(f"it needs members that are not there ({role})")
        stack, names = found
        c = torch.tensor([0.0, *[named[name] for name in names[1:]]], dtype=torch.float64)
        c[0] = 1 - c.sum()
        return _run(case, Blend(stack, c), draws)

    return sample


def _guidance(*, normalised: bool) -> Sampler:
    def sample(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
        base, scale = case.differentiable_base(len(draws)), options.get("scale") or 0.0
        if base is None:
            raise NotApplicable("it needs a base that can be differentiated")
        if not scale and case.kl_weight is None:
            raise NotApplicable("its scale is 1/kl_weight, which is not known here; set one")
        scale = scale or 1 / float(case.kl_weight or 1)
        used = {name: w for name, w in wanted.weights.items() if w}
        if not used:
            raise NotApplicable("it needs a reward with a weight other than 0")
        rewards = {}
        for name in used:
            reward = case.differentiable(name)
            if reward is None:
                raise NotApplicable(f"it needs rewards with a gradient, which {name} has not")
            rewards[name] = reward
        full, gamma = wanted.strength * scale, options.get("gamma") or 0.0
        guided = RewardGuidance(
            base, case.schedule, rewards, used, tempered(full, gamma, case.grid) if gamma else full,
            normalised=normalised,
        )  # fmt: skip
        drawn = _run(case, guided, draws)
        return Drawn(drawn.samples, drawn.model_calls, drawn.model_calls, reward_calls=drawn.model_calls)

    return sample


def _base_sde(case: Case, batch: int) -> BackwardSDE:
    return BackwardSDE(case.schedule, Blend(case.stack(batch), _first(len(case.names))))


def _first(members: int) -> Tensor:
    return torch.tensor([1.0, *[0.0] * members], dtype=torch.float64)


def _code(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
    x, many = draws.start(case.like, case.schedule.prior_std()), options["candidates"]
    reward, noise = case.weighted(wanted), draws.noise(many)
    return code(
        _base_sde(case, len(draws)), x, case.grid, reward, noise=noise, candidates=many, block=options["block"],
        step=case.step,
    )  # fmt: skip


def _best_of_n(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
    many = options["candidates"]
    x = draws.start(case.like, case.schedule.prior_std(), many)
    sde = _base_sde(case, len(draws))
    rows = torch.arange(len(draws)).repeat_interleave(many)
    wide = BackwardSDE(case.schedule, restrict_rows(sde.score, rows))
    return best_of_n(
        wide, x.unflatten(0, (len(draws), many)), case.grid, case.weighted(wanted), noise=draws.noise(many),
        step=case.step,
    )  # fmt: skip


def _steer(potential: Literal["difference", "maximum", "sum"]) -> Sampler:
    def sample(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
        if case.kl_weight is None:
            raise NotApplicable("it needs a kl_weight that is known")
        x = draws.start(case.like, case.schedule.prior_std())
        return steer(
            _base_sde(case, len(draws)), x, case.grid, case.weighted(wanted), case.kl_weight, noise=draws.noise(),
            generator=draws.generator("ancestors"), potential=potential, step=case.step, **options,
        )  # fmt: skip

    return sample


def _union(case: Case, wanted: Wanted, draws: Draws, options: Options) -> Drawn:
    if wanted.strength != 1:
        raise NotApplicable("members are mixed at the strength they were tuned at")
    if any(w < 0 for w in wanted.weights.values()) or not any(wanted.weights.values()):
        raise NotApplicable("it needs weights that are not negative, one of them above 0")
    if not case.step.stochastic:
        raise NotApplicable("it follows the members by their noise, and needs a solver that has some")
    x = draws.start(case.like, case.schedule.prior_std())
    weights = [0.0, *case.union_weights(wanted)]
    stack = case.stack(len(draws))
    return sample_union(stack, case.schedule, x, case.grid, weights, noise=draws.noise(), step=case.step)


_BLEND, _FK = "Cheng et al. 2505.18547", "Singhal et al. 2501.06848"
_RESAMPLE: Spec = {"threshold": (float, 0.5), "tempering": (float, 1.0)}
_GUIDED: Spec = {"scale": (float, 0.0), "gamma": (float, 0.0)}
_STEER: Spec = {"every": (int, 5), "threshold": (float, 0.5)}
_NO_SOUP = "it needs members that are networks"

METHODS: Final[Mapping[str, Method]] = {
    "base": Method("base", _base, "-", "1 model call a step", aims=False),
    "exact": Method(
        "MORL (tuned for r(w))",
        _single("exact", "there is no model tuned for this preference"),
        "Rame et al. 2306.04488, MORL; on mixtures the closed form",
        "1 model call a step, one training a preference",
    ),
    "mpa": Method("DB-MPA", _blend("certify"), f"{_BLEND}, algorithm 1", "K model calls a step"),
    "mpa-corrected": Method(
        "DB-MPA corrected", _blend("resample", weighted=True), "Feynman-Kac correction: Skreta et al. 2503.02819",
        "K model calls a step", _RESAMPLE,
    ),
    "mpa-reweighted": Method(
        "DB-MPA reweighted", _blend("certify", weighted=True), "importance weights of the same correction",
        "K model calls a step",
    ),
    "kla": Method("DB-KLA", _kla, f"{_BLEND}, algorithm 2", "2 model calls a step"),
    "ls-systematic": Method(
        "DB-MPA-LS systematic", _one_member("systematic"), f"{_BLEND}, algorithm 3; Tijdeman 1980",
        "1 model call a step",
    ),
    "ls-independent": Method(
        "DB-MPA-LS independent", _one_member("independent"), f"{_BLEND}, algorithm 3", "1 model call a step"
    ),
    "ls-shared": Method(
        "DB-MPA-LS shared", _one_member("shared"), f"{_BLEND}, as its code does: one draw for the batch",
        "1 model call a step",
    ),
    "quadratic": Method(
        "quadratic strength", _higher_order("half"), "Lagrange interpolation in the strength",
        "2K - 1 model calls a step",
    ),
    "pairwise": Method(
        "pairwise DB-MPA", _higher_order("pairs"), "second order in the weights; exact halfway between two",
        "K(K + 1)/2 model calls a step",
    ),
    "over-time": Method(
        "weights over time", _over_time, "weights equal in noise, as asked in data", "K model calls a step", aims=False
    ),
    "soup": Method(
        "rewarded soup", _single("soup-deltas", _NO_SOUP), "Rame et al. 2306.04488, mean of the differences",
        "1 model call a step",
    ),
    "soup-factors": Method(
        "soup of factors", _single("soup-factors", _NO_SOUP), "mean of LoRA factors, as DB's code does",
        "1 model call a step",
    ),
    "composite": Method(
        "LoRA Composite", _composite, "Zhong et al. 2402.16843: members alike, whatever the weights",
        "K model calls a step", aims=False,
    ),
    "switch": Method(
        "LoRA Switch", _one_member("systematic", equal=True), "Zhong et al. 2402.16843: members in turn",
        "1 model call a step", aims=False,
    ),
    "union": Method(
        "OR of members", _union, "Skreta et al. 2412.17762; its law is the mixture of members", "K model calls a step",
        aims=False,
    ),
    "code": Method(
        "CoDe", _code, "Singh et al. 2502.00968", "N model calls a step, N reward calls a block",
        {"candidates": (int, 20), "block": (int, 5)}, aims=False,
    ),
    "best-of-n": Method(
        "best of n", _best_of_n, "Stiennon et al. 2009.01325", "n model calls a step, n reward calls",
        {"candidates": (int, 20)}, aims=False,
    ),
    "guidance": Method(
        "reward guidance", _guidance(normalised=False), "Chung et al. 2209.14687 (DPS); scale 1/kl_weight",
        "1 model call and gradient a step, 1 reward call and gradient a step", _GUIDED,
    ),
    "guidance-normalised": Method(
        "reward guidance, normalised", _guidance(normalised=True), "Bansal et al. 2302.07121; unit gradients",
        "1 model call and gradient a step, 1 reward call and gradient a step", _GUIDED, aims=False,
    ),
    "steer-difference": Method(
        "FK steering, difference", _steer("difference"), _FK, "1 model call a step, 1 reward call a resampling", _STEER
    ),
    "steer-maximum": Method(
        "FK steering, maximum", _steer("maximum"), _FK, "1 model call a step, 1 reward call a resampling", _STEER
    ),
    "steer-sum": Method(
        "FK steering, sum", _steer("sum"), _FK, "1 model call a step, 1 reward call a resampling", _STEER
    ),
}  # fmt: skip

