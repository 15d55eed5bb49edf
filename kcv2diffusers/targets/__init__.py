"""Writers: target files are laid out in advance, then tensors are streamed into them."""
