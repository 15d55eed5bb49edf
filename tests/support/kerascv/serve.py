"""The scripts of this folder, run one after the other in one process: Keras takes longer to start than most
of them take.

    python serve.py

A line of the standard input is a request, [script, argument, ...] in JSON. Its answer is a line of JSON too:
[true, what the script printed] or [false, its traceback].
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import sys
import traceback
from contextlib import redirect_stdout

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they like, keras-cv 0.4.2 when it is imported
    # as kcv2diffusers.system.garbage does, which not all stacks have
    gc.set_threshold(2_000, 10, 100)
    import stack

    if stack.keras.backend.backend() == "torch":
        import torch

        torch.set_grad_enabled(False)
    for line in sys.stdin:
        script, *arguments = json.loads(line)
        printed = io.StringIO()
        try:
            stack.start_anew()
            with redirect_stdout(printed):
                importlib.import_module(script).main(arguments)
            answer = [True, printed.getvalue()]
        except (Exception, SystemExit):
            answer = [False, traceback.format_exc()]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
