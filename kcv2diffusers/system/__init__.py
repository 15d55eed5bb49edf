"""Files, processes and signals of the operating system; nothing of models."""
