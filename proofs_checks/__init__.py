"""Every statement of the theory, checked on problems drawn anew; one module a statement.

``python -m proofs_checks`` (or ``sdeblend verify``) runs all of them. A check computes both sides of its
statement independently, says what would falsify it, and carries a power control: the same measurement
on a deliberately wrong version, which it must reject.
"""

from importlib import import_module
from types import ModuleType

# In the order of the paper, then what goes beyond it.
STATEMENTS = (
    "closed_forms",
    "proposition_1",
    "lemma_1",
    "remark_2",
    "lemma_2",
    "fokker_planck",
    "proposition_2",
    "feynman_kac",
    "certificate",
    "solvers",
    "limits",
    "members",
)


def statement(name: str) -> ModuleType:
    """Import the module of one statement."""
    return import_module(f"proofs_checks.{name}")
