"""The trainers by name, one a file, and what several of them share: the one place that lists them.

policy    paths of the ancestral chain, likelihood ratios, what a step costs in KL
replay    the last steps that a policy took, shared out over processes
value     what a path will earn, as a baseline
"""

from collections.abc import Mapping

from sdeblend.finetune.trainer import Trainer
from sdeblend.finetune.trainers.adjoint import AdjointMatching
from sdeblend.finetune.trainers.backprop import RewardBackprop
from sdeblend.finetune.trainers.ddpo import DDPO
from sdeblend.finetune.trainers.dpok import DPOK
from sdeblend.finetune.trainers.regression import RewardRegression

TRAINERS: Mapping[str, type[Trainer]] = {
    trainer.name: trainer for trainer in (RewardRegression, DDPO, DPOK, RewardBackprop, AdjointMatching)
}
