"""Writers: target files laid out in advance, and the bytes that stream into them."""
