"""The Hugging Face Hub as a source: addresses, the connection, what a repository holds, downloads."""
