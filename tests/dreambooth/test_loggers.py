"""What TensorBoard reads back. Weights & Biases is not among the dependencies of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.loggers import open_loggers


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["torch", "tensorflow"])
def test_tensorboard(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorflow import make_ndarray

    if writer == "tensorflow":
        monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    (log,) = open_loggers(Config(tensorboard=True, out=str(tmp_path)))
    for step, loss in ((3, 0.5), (4, 0.25)):
        log(step, {"loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0})
    events.Reload()
    if writer == "torch":
        found = [(e.step, e.value) for e in events.Scalars("loss")]
    else:
        found = [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors("loss")]
    assert found == [(3, 0.5), (4, 0.25)]
