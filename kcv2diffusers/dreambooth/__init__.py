"""DreamBooth on Keras 3: a rare identifier bound to a subject, with class-specific prior preservation.

`config` (every option, once), `photos` (files to pictures of bucket sizes), `batches` (what a step sees, a
function of its number), `model` (the network and its loss, for `fit`), `optimizers`, `checkpoints` (what is
kept, and going on), `train` (all of it, in order). Ruiz et al. 2023, arXiv:2208.12242.
"""
