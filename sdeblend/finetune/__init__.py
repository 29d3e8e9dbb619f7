"""Trainers that tune a base for a reward at a known KL weight; they know no backend.

    model      what a trainer needs of a model: a base and a trainable difference to it
    chain      the ancestral chain: Gaussian steps, log-probability, exact KL
    paths      the tuned process by second-order steps, with the base's beside it
    trainer    what all trainers share; `trainers` has them, one a file

The optimum of every trainer is p_base exp(r / kl_weight) / Z, the member that ``sdeblend.blend`` blends.
"""
