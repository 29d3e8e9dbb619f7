"""Comparing methods: a grid of cells, paired seeds, stored rows, and tables that say n, cost and what is not known.

plan        CONFIG.toml -> plan -> cells               backend   what is sampled and measured: mixtures, images
run         cells, by one process or many              store     the results folder
statistics  bootstrap, win rates, hypervolume          results   what is stored and found, with one codec
summary     stored rows -> numbers                     tables, figures, report
command     ``sdeblend evaluate``                      compare   ``sdeblend compare``
"""
