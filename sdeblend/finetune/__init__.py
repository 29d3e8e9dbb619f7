"""Trainers that tune a base for a reward at a known KL weight; they know no backend.

    model        what a trainer needs of a model: a base and a trainable difference to it; the table that builds one
    paths        the walk under every trainer, what a path costs in KL, its log ratio to the base
    workers      the scale of the loss and networks in half precision, the same on all processes
    trainer      what all trainers share
    trainers     one a file, listed in their ``__init__``: a new one is a file and a line there
    config       the settings file
    checkpoint   a run in one file
    run          the loop around a trainer

The optimum of every trainer is p_base exp(r / kl_weight) / Z, the member that ``sdeblend.blend`` blends.
"""
