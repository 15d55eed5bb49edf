"""The web page of `kcv2diffusers app`. The commands run as child processes of its server."""
