"""A case of the methods for a problem on mixtures: closed forms, and what a test puts in their place."""

import torch

from sdeblend import Ancestral, VPLinear, time_grid
from sdeblend.methods.case import Case


class ProblemCase(Case):
    """A problem with its sampler, in float64.

    Args:
        problem: base, rewards and KL weight.
        grid: decreasing times; 60 steps if left out.
        step: the solver's.
        stack: in place of the problem's own.
        rewards: in place of the problem's own, by name.
    """

    def __init__(self, problem, *, grid=None, step=None, stack=None, rewards=None):
        self.problem, self.rewards = problem, problem.rewards | (rewards or {})
        self.names, self.kl_weight, self.schedule = problem.names, problem.kl_weight, VPLinear()
        self.grid = time_grid(self.schedule, 60, "log-snr") if grid is None else grid
        self.step, self.like = step or Ancestral(), torch.zeros(problem.base.dim, dtype=torch.float64)
        self.scores = problem.stack(self.schedule) if stack is None else stack

    def stack(self, batch):
        return self.scores

    def reward(self, name):
        return self.rewards[name]
