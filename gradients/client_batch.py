"""Which images a client holds: the i-th batch, or one with repeated labels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from core.data.data_sets import DataSets, derived_seed, take_samples
from core.data.specs import DataSpec
from core.errors import InputError


def batch_indices(n: int, batch_size: int, index: int, seed: int) -> list[int]:
    """The i-th batch of a seeded shuffle of the data set; batches do not overlap.

    Args:
        n: Images in the data set.
        batch_size: Images per batch.
        index: Number of the batch, from 0.
        seed: Seed of the shuffle.

    Raises:
        InputError: The data set has no such batch.
    """
    if batch_size < 1:
        raise InputError(f"-b {batch_size}: a batch needs at least one image")
    if batch_size > n:
        raise InputError(f"-b {batch_size}: the data set has {n} images")
    n_batches = n // batch_size
    if not 0 <= index < n_batches:
        raise InputError(
            f"--target-idx {index}: {n} images make {n_batches} batches of {batch_size}"
        )
    order = torch.randperm(n, generator=_generator(seed))
    return order[index * batch_size : (index + 1) * batch_size].tolist()


def duplicate_label_indices(
    labels: Sequence[int], batch_size: int, duplicates: int, index: int, seed: int
) -> list[int]:
    """A batch in which every label occurs `duplicates` times, with different images.

    Args:
        labels: Class index of every image of the data set.
        batch_size: Images per batch, a multiple of `duplicates`.
        duplicates: Images per label.
        index: Which batch; every index draws classes and images anew.
        seed: Seed of the draw.

    Returns:
        Indices, grouped by class.

    Raises:
        InputError: The data set has too few classes with enough images.
    """
    if duplicates < 1 or batch_size % duplicates:
        raise InputError(
            f"-b {batch_size} is not a multiple of {duplicates}, the number of images per label"
        )
    if batch_size > len(labels):
        raise InputError(f"-b {batch_size}: the data set has {len(labels)} images")
    if index < 0:
        raise InputError(f"--target-idx {index} must not be negative")
    by_class: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        by_class.setdefault(int(label), []).append(position)
    eligible = sorted(label for label, found in by_class.items() if len(found) >= duplicates)
    n_classes = batch_size // duplicates
    if len(eligible) < n_classes:
        raise InputError(
            f"--duplicate-label needs {n_classes} classes with at least {duplicates} images each "
            f"and the data set has {len(eligible)}"
        )
    generator = _generator(derived_seed(seed, index))
    chosen = [eligible[i] for i in torch.randperm(len(eligible), generator=generator)[:n_classes]]
    return [i for label in chosen for i in _draw(by_class[label], duplicates, generator)]


def load_batch(
    data: DataSets, indices: Sequence[int], workers: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read training images under the fixed transform.

    Args:
        data: The data set.
        indices: Positions of the images in the data set.
        workers: Threads that decode; 0: none besides the caller.

    Returns:
        Images (N x C x H x W, in [0, 1]) and labels (N), in the order of `indices`.
    """
    read = partial(take_samples, data.train_plain, spec=data.spec)
    if workers < 2 or len(indices) < 2:
        return read(indices)
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(read, [[index] for index in indices]))
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def validation_guesses(
    data: DataSets, originals: torch.Tensor, workers: int = 0, limit: int = 1000
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What images that are not the client's tell of the client's, without any gradient.

    Args:
        data: The data set.
        originals: The client's images, N x C x H x W in [0, 1].
        workers: Threads that decode; 0: none besides the caller.
        limit: Validation images at most, spread evenly over the set.

    Returns:
        Their mean (C x H x W) and, for each original, the one nearest to it in squared
        error (N x C x H x W), both in [0, 1]; None twice where there are none.
    """
    n = len(data.val)
    chosen = range(0, n, max(1, -(-n // limit)))
    if data.spec.n_tokens and n:
        return sentence_guesses(take_samples(data.val, chosen, data.spec)[0], originals, data.spec)
    pieces = [chosen[start : start + 50] for start in range(0, len(chosen), 50)]
    if not pieces:
        return None, None

    def look(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = take_samples(data.val, indices, data.spec)[0].double()
        squares = torch.stack([(images - x).square().flatten(1).mean(1) for x in originals])
        distance, index = squares.min(1)
        return images.sum(0), distance, images[index]

    with ThreadPoolExecutor(max(1, workers)) as pool:
        sums, distances, nearest = zip(*pool.map(look, pieces), strict=True)
    best = torch.stack(distances).argmin(0)
    winners = torch.stack([nearest[piece][i] for i, piece in enumerate(best.tolist())])
    return (torch.stack(sums).sum(0) / len(chosen)).float(), winners.float()


def sentence_guesses(
    known: torch.Tensor, originals: torch.Tensor, data: DataSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """What sentences that are not the client's tell of the client's, without any gradient.

    Args:
        known: M x T token ids.
        originals: The client's, N x T.
        data: Says what fills up sentences.

    Returns:
        The T most frequent tokens, the most frequent first; and for each original the known
        sentence with most tokens in their places (N x T).
    """
    length = known.shape[1]
    words = known[data.is_word(known)]
    frequent = words.bincount(minlength=length).argsort(descending=True, stable=True)
    alike = (originals[:, None] == known[None]).sum(-1)
    return frequent[:length], known[alike.argmax(1)]


def public_samples(
    data: DataSets, workers: int = 0, limit: int = 500
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are no client's, with labels: those of the validation set, at most `limit`.

    Raises:
        InputError: There are none.
    """
    n = len(data.val)
    if n == 0:
        raise InputError("--malicious: the server has no images of its own (no validation set)")
    indices = range(0, n, max(1, -(-n // limit)))
    pieces = [indices[start : start + 50] for start in range(0, len(indices), 50)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        parts = list(pool.map(lambda piece: take_samples(data.val, piece, data.spec), pieces))
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _draw(items: Sequence[int], n: int, generator: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=generator)[:n]]


def _generator(seed: int) -> torch.Generator:
    # Torch takes 64 bits; derived seeds use all of them.
    return torch.Generator().manual_seed(seed % 2**63)
