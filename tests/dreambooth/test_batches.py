"""What steps see: all photos, one size a step, the same again for the same seed and step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kcv2diffusers.diffusion import LATENT_SCALE
from kcv2diffusers.dreambooth.batches import Batches, Examples
from kcv2diffusers.dreambooth.photos import Photo


def photos(*sizes: tuple[int, int]) -> list[Photo]:
    return [Photo(Path(f"{number}.png"), size) for number, size in enumerate(sizes)]


class Recorded(Examples):
    """Examples whose moments tell which photo they are of, and how it was asked for."""

    def _encoded(self, number, size, flip, place):
        self.asked.append((number, size, flip, place))
        values = np.zeros((size[0] // 8, size[1] // 8, 8), "float32")
        values[..., :4], values[..., 4:] = number + 100 * flip, -100  # no deviation
        return values


def recorded(found: list[Photo], condition: int, **options) -> Recorded:
    conditions = {"": np.full((7, 3), condition, "float32"), "sks": np.full((7, 3), 9, "float32")}
    examples = Recorded(found, conditions, lambda x: x, 128, **options)
    examples.asked = []
    return examples


SIZES = [(100, 100), (90, 100), (300, 100), (100, 300), (100, 100)]


def make(start: int = 0, seed: int = 5, **options) -> Batches:
    instance, classes = recorded(photos(*SIZES), 1), recorded(photos(*[(64, 64)] * 4), 2)
    return Batches(instance, classes, batch_size=2, steps=40, start=start, seed=seed, **options)


def test_a_step_is_a_function_of_seed_and_number() -> None:
    first, later = make(), make(start=7)
    assert len(first) == 40 and len(later) == 33
    for index in (0, 5, 32):
        one, other = first[7 + index][0], later[index][0]
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert not np.array_equal(first[0][0]["noise"], first[1][0]["noise"])
    assert not np.array_equal(first[0][0]["timesteps"], make(seed=6)[0][0]["timesteps"])


def test_every_epoch_sees_every_photo_and_a_step_has_one_size() -> None:
    batches = make()
    assert set(batches.by_size) == {(128, 128), (192, 64), (64, 256)} or len(batches.by_size) == 3
    orders = []
    for epoch in range(3):
        seen = []
        for index in range(batches.epoch_length):
            step = batches[epoch * batches.epoch_length + index][0]
            assert step["latents"].shape == step["noise"].shape and step["latents"].shape[0] == 4
            seen += (step["latents"][:2, 0, 0, 0] / LATENT_SCALE).round().astype(int).tolist()
        assert set(seen) == {0, 1, 2, 3, 4}
        orders.append(seen)
    assert orders[0] != orders[1]


def test_an_epoch_takes_a_photo_as_often_as_its_folder_says() -> None:
    often = [Photo(Path("often.png"), (100, 100), repeats=5), *photos((100, 100), (100, 300))]
    batches = Batches(recorded(often, 1), None, batch_size=1, steps=16)
    assert batches.epoch_length == 7
    for epoch in range(2):
        steps = [batches[epoch * 7 + index][0]["latents"][0, 0, 0, 0] for index in range(7)]
        seen = [round(float(step / LATENT_SCALE)) for step in steps]
        assert sorted(seen) == [0, 0, 0, 0, 0, 1, 2]


def test_class_pictures_come_second_and_all_in_turn() -> None:
    batches = make()
    seen = []
    for index in range(4):
        step = batches[index][0]
        assert step["prior"].tolist() == [0, 0, 1, 1]
        assert step["condition"][:, 0, 0].tolist() == [1, 1, 2, 2]
        seen += (step["latents"][2:, 0, 0, 0] / LATENT_SCALE).round().astype(int).tolist()
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_without_classes_there_is_no_prior() -> None:
    batches = Batches(recorded(photos(*SIZES), 1), None, batch_size=1, steps=3)
    assert batches[0][0]["prior"].tolist() == [0] and len(batches[0][0]["latents"]) == 1


def test_offset_noise_shifts_whole_channels() -> None:
    plain, shifted = make()[0][0]["noise"], make(offset_noise=0.5)[0][0]["noise"]
    offset = shifted - plain
    assert np.ptp(offset, axis=(1, 2)).max() < 1e-6 and np.abs(offset).max() > 0.05


@pytest.mark.parametrize("cache", [True, False])
def test_cache(cache: bool) -> None:
    examples = recorded(photos((100, 100)), 1, cache=cache, flip=True)
    rng = np.random.default_rng(0)
    got = [examples.moments(0, (128, 128), examples.view(rng))[0, 0, 0] for _ in range(20)]
    assert set(got) == {0, 100}
    if cache:
        assert {entry[2:] for entry in examples.asked} == {(False, (0.5, 0.5)), (True, (0.5, 0.5))}
        assert len(examples.asked) == 2
    else:
        assert len({entry[3] for entry in examples.asked}) == 20


def test_latents_are_drawn_around_the_mean() -> None:
    examples = Examples(photos((64, 64)), {"": np.zeros((1, 1), "float32")}, lambda x: x, 64)
    moments = np.zeros((64, 64, 8), "float32")
    moments[..., :4], moments[..., 4:] = 2.0, np.log(0.25)
    examples._moments[0, (64, 64), False] = moments
    latents = Batches(examples, None, batch_size=1, steps=1)[0][0]["latents"]
    assert abs(latents.mean() / LATENT_SCALE - 2) < 0.02 and abs(latents.std() / LATENT_SCALE - 0.5) < 0.02
