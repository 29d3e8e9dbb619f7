"""What a blend is compared with, on the same schedules, stacks, steps and noise.

    search         best of n; CoDe, block-wise best of n on the predicted clean sample
    steering       Feynman-Kac steering, rewards as potentials
    guidance       reward-gradient guidance
    union          the OR of preferences: a mixture of members with tracked density ratios
    interpolation  quadratic strength, pairwise-corrected DB-MPA: coefficients over more members

Rewarded soups average weights and so belong to a backend (``stablediffusion.adapters``, ``toy.networks.network``).
Multi-LoRA Composite is DB-MPA with equal weights, Multi-LoRA Switch one member a step in turn (``sdeblend.select``):
Zhong et al. 2402.16843.
"""
