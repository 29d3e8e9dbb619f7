"""Every way to sample a preference, on the same schedules, stacks, steps and noise.

case           what a method samples, and what it returns
draws          noise by (prompt, seed, step), the same for all
method         what a method is; registry: all of them

one_model      the base, the model tuned for r(w), soups
blends         DB-MPA, DB-KLA, corrected, reweighted, LoRA Composite, weights over time
one_member     DB-MPA-LS, LoRA Switch: one member a step
moves          DB-MPA, corrected or not, and DB-MPA-LS with Langevin moves between steps
interpolation  quadratic strength, pairwise DB-MPA: coefficients over more members
union          the OR of preferences: a mixture of members with tracked density ratios
search         best of n; CoDe, block-wise best of n on the predicted clean sample
guidance       reward-gradient guidance
steering       Feynman-Kac steering, rewards as potentials
"""
