"""Every statement of the theory, checked on problems drawn anew; one module a statement.

``python -m proofs_checks`` (or ``sdeblend verify``) runs all of them. A check computes both sides of its
statement independently, says what would falsify it, and carries a power control: the same measurement
on a deliberately wrong version, which it must reject. A module put into this folder is a statement: to add one,
add its file (``proofs_checks.harness.check`` says what it has in it).
"""
