"""The Hugging Face Hub as a source: addresses, the client, the content of repositories, downloads."""
