"""A study: a grid over training and sampling settings, drawn, measured, and shown on one page.

The modules: `plan` (the file, expanded to runs and cells), `run` (what is done already, and the rest), `one`
(a training run from start to end), `child` and `draw` (its processes), `schedulers` (the samplers),
`measures` with `judge` and `features`, `table` (rows, ranks, CSV, text), `page` (the HTML page).
"""
