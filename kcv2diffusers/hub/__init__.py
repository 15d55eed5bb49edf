"""The Hugging Face Hub at both ends: checkpoints read by id, pipelines published.

`address` (how a source is written), `client` (the connection, and each refusal in words), `layout` (from a
repository's listing to the files that are needed), `download` (hf:// to paths on this machine), `check` (a
pipeline before it is published), `card` (its model card), `push`, `space` (the folder of a demo Space).
"""
