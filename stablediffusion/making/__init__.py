"""How the bundled model and its members were made and measured; nothing that runs needs it, and no wheel has it.

    python -m stablediffusion.making.train --out DIR        the model, from nothing
    python -m stablediffusion.making.measure_model          what it draws
    python -m stablediffusion.making.tune_members           its members, and what they do

Each says more with --help. What was measured is told in ``stablediffusion/small/MODEL_CARD.md``.
"""
