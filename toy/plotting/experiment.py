"""The figure of an experiment: its laws, and each method's samples on the exact target with the numbers above."""

from __future__ import annotations

from matplotlib.figure import Figure

from toy.experiment.experiment import Outcome
from toy.plotting.laws import Cloud, compare_figure, style_of


def experiment_figure(outcome: Outcome) -> Figure:
    """Return the figure of an experiment.

    Args:
        outcome: what ``toy.experiment.run`` returned.

    Returns:
        one panel for base, members and exact target, one for each method.
    """
    problem, settings, prepared = outcome.problem, outcome.settings, outcome.prepared
    clouds = {}
    for name, sampled in outcome.samples.items():
        numbers = outcome.report["methods"][name]
        title = (
            f"{style_of(name).label}\n"
            f"mode TV {numbers['mode_weight_tv']:.3f} (floor {numbers['mode_weight_tv_floor']:.3f}), "
            f"sliced W2 {numbers['sliced_w2']:.3f} ({numbers['sliced_w2_floor']:.3f})"
        )
        clouds[name] = Cloud(sampled.points, sampled.log_weights, title)
    shares = prepared.coefficients[1:].tolist()
    preference = ", ".join(f"{name} {share:.3g}" for name, share in zip(problem.names, shares, strict=True))
    return compare_figure(
        problem.base,
        prepared.members,
        prepared.target,
        clouds,
        title=(
            f"{problem.name}: {preference} at KL weight {problem.kl_weight:g}; {settings.solver}, "
            f"{settings.steps} steps, {settings.samples} samples"
        ),
    )
