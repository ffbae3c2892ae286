"""Every image is seen as often as it should be, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.data.data_sets import load_data
from core.data.loaders import (
    ShardedBatches,
    ValidationShard,
    check_batches,
    make_loader,
    poisson_batches,
    shuffled_batches,
)
from core.errors import InputError
from core.processes.distributed import Process
from tests.image_folders import write_tree


@pytest.mark.parametrize(("n", "batch_size"), [(100, 32), (33, 32), (7, 32), (64, 32), (5, 1)])
def test_shuffled_batches_drop_nothing(n: int, batch_size: int) -> None:
    batches = shuffled_batches(n, batch_size, seed=0, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(n))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {
        tuple(np.concatenate(shuffled_batches(50, 8, seed, epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_poisson_sampling() -> None:
    batches = [batch for epoch in range(200) for batch in poisson_batches(40, 10, 0, epoch)]
    assert len(batches) == 800
    counts = np.bincount(np.concatenate(batches), minlength=40)
    # Each image independently with probability 1/4: mean 200, deviation 12.2.
    assert abs(counts.mean() - 200) < 10
    assert counts.min() > 150
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.var() == pytest.approx(40 * 0.25 * 0.75, rel=0.2)
    assert all(len(set(batch)) == len(batch) for batch in batches)


@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_make_up_the_batch(poisson: bool, world_size: int) -> None:
    samplers = [
        ShardedBatches(20, 6, Process(rank, world_size), seed=0, poisson=poisson)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(4)
    whole = samplers[0].batches
    for step, parts in enumerate(zip(*samplers, strict=True)):
        keys = [key for part in parts for key in part]
        assert [index for _, index in keys] == whole[step].tolist()
        assert {epoch for epoch, _ in keys} <= {4}


def test_validation_sees_each_image_once() -> None:
    shards = [list(ValidationShard(10, 4, Process(rank, 3))) for rank in range(3)]
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(tmp_path: Path, workers: int) -> None:
    data = load_data(write_tree(tmp_path))
    batches = ShardedBatches(len(data.train), 3, Process(0, 2), seed=0, poisson=True)
    loader = make_loader(data.train, batches, data.spec.shape, Process(0, 2), 2 * workers)
    state = torch.random.get_rng_state()
    loaded = list(loader)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(labels) for _, labels in loaded] == [len(keys) for keys in batches]
    assert {tuple(images.shape[1:]) for images, _ in loaded} == {data.spec.shape}
    reference = [data.train[key][0] for keys in batches for key in keys]
    assert torch.equal(torch.cat([images for images, _ in loaded]), torch.stack(reference))
    assert loader.num_workers == workers


def test_empty_shard_has_the_shape_of_images(tmp_path: Path) -> None:
    data = load_data(write_tree(tmp_path))
    # One expected image over four processes: most shards are empty.
    batches = ShardedBatches(len(data.train), 1, Process(3, 4), seed=0, poisson=True)
    loader = make_loader(data.train, batches, data.spec.shape, Process(3, 4), 0)
    images, labels = next(iter(loader))
    assert images.shape == (0, 3, 8, 8)
    assert labels.shape == (0,)


def test_impossible_batches() -> None:
    check_batches(16, 8, 4, poisson=False)
    check_batches(16, 2, 4, poisson=True)
    with pytest.raises(InputError, match="--batch-size 2"):
        check_batches(16, 2, 4, poisson=False)
