"""Trainers that tune a base for a reward at a known KL weight; they know no backend.

    model      what a trainer needs of a model: a base and a trainable difference to it
    chain      the ancestral chain: Gaussian steps, log-probability, exact KL
    reward     rewards, checked and weighted
    trainer    what all trainers share

The optimum of every trainer is p_base exp(r / kl_weight) / Z, the member that ``sdeblend.blend`` blends.
"""
