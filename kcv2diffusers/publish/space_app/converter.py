"""The web page of kcv2diffusers as a Space. `kcv2diffusers space --converter` copies this file as app.py."""

import os

from kcv2diffusers.app.server import serve

if __name__ == "__main__":
    serve(
        host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        most_gigabytes=float(os.environ.get("MAX_SIZE", "8")),
        minutes=float(os.environ.get("TIME_LIMIT", "60")),
        trains=os.environ.get("NO_TRAIN", "0") in ("", "0"),
    )
