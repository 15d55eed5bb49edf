"""Files, processes and signals of the operating system. No module here depends on models or weights."""
