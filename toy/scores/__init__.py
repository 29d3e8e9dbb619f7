"""Scores of mixtures, as fast as a product of matrices: the stack that problems are blended from, and its kernels."""

from toy.scores.stack import MixtureStack, mixture_score

__all__ = ["MixtureStack", "mixture_score"]
