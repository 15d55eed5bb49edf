"""DreamBooth on Keras 3: bind a rare identifier to a subject, with class-specific prior preservation.

Ruiz et al. 2023, arXiv:2208.12242. The modules: `config` (every option, defined once), `photos` (image files
to arrays of bucket sizes), `batches` (the inputs of a step, a function of its number), `model` (the network
and its loss, for `fit`), `optimizers`, `checkpoints` (saving and resuming), `train` (the whole run, in
order).
"""
