"""Whether a pipeline is what its KerasCV checkpoints say, on three levels: `kcv2diffusers verify`.

`request` is what is to be verified, `sides` what is compared with what, `bars` where a difference is too
large.
`weights` and `settings` compare files. For `modules` and `images` each side runs in a process of its own
(`keras_side`, with `kerascv` for KerasCV's classes, then `diffusers_side`; `exchange` starts them), from
`inputs` and into arrays that are compared here. `result` is what was found, `report` a page that shows it,
`run` all of it in order.
"""
