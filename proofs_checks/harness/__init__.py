"""What all checks share: problems, both sides of a measurement, the runner, its command and its report."""
