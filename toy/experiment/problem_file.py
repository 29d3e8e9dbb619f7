"""Problem files: a mixture, rewards and a blend in TOML, checked before anything is computed.

    [base] and [[rewards]]      ``toy.tables.MixtureTables``
    [blend]                     ``BlendTable``: kl_weight and weights; the rest has defaults

Every message names the file, the table and what is allowed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pydantic import Field

from sdeblend.shell.settings import parse, read_toml
from toy.experiment.prepared import about, prepare
from toy.experiment.settings import BlendSettings
from toy.problems import Problem
from toy.tables import BaseTable, MixtureTables, RewardTable


class BlendTable(BlendSettings):
    """The table [blend] of a problem file.

    Attributes:
        kl_weight: alpha of the members.
    """

    kl_weight: float = Field(gt=0)


class ProblemFile(MixtureTables):
    """A problem file.

    Attributes:
        blend: how the problem is blended and sampled.
    """

    blend: BlendTable


TABLES: Final = {"[base]": BaseTable, "[[rewards]]": RewardTable, "[blend]": BlendTable}


def load_problem(path: str | os.PathLike[str]) -> tuple[Problem, BlendSettings]:
    """Read a problem file.

    Args:
        path: The TOML file.

    Returns:
        The problem, named after the file, and the settings of its blend; ``toy.experiment.run`` takes both.

    Raises:
        ValueError: If the file is not TOML or something in it cannot be used; names the file, the table and the
            key or the component, and says what is allowed.
        OSError: If it cannot be read.
    """
    read = parse(ProblemFile, read_toml(path), file=path)
    with about(f"{path}: [blend]"):
        problem = read.problem(Path(path).stem, read.blend.kl_weight)
        prepare(problem, read.blend)
    return problem, read.blend
