"""The weight maps: tables of names, shapes and layouts, read from `weight_maps/*.toml`."""
