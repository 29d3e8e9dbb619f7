"""Comparing methods: a grid of cells, paired seeds, stored rows, and tables that say n, cost and what is not known.

config     CONFIG.toml -> plan -> cells         backend   what is sampled: mixtures, images
run        cells, by one process or many         rows      the results folder
measures   bootstrap, win rates, hypervolume     report    how results are told
groups     methods on one preference, paired     fronts    Pareto fronts over preferences
summary    stored rows -> numbers                tables, plotting, plotting_sheets
command, compare
"""
