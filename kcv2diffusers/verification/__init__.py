"""Compare a pipeline with the KerasCV checkpoints it was made of, on three levels: `kcv2diffusers verify`.

`request` defines what is verified, `sides` pairs each part with its source, and `tolerances` holds the PSNR
limits. `weights` and `settings` compare files. For `modules` and `images`, each side runs in its own process:
`keras_side` (with `kerascv` for KerasCV's classes), then `diffusers_side`; `exchange` starts them. Both sides
read `inputs` and write arrays, which are compared here. `result` holds the outcome, `report` writes it as an
HTML page, and `run` calls all of it in order.
"""
