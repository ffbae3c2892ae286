"""The embedded data set of the federated stage: chest phantoms spread over nine sites.

Sites, batch sizes and section sizes are those of the published chest X-ray experiment
(Hatamizadeh et al. 2022, https://arxiv.org/abs/2202.06924): eight sites with 8 to 512
training images, a ninth with a single one, and validation and test images in common.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from core.data.list_files import Sample, write_datalist
from core.errors import InputError
from federated.phantoms.anatomy import chest_radiograph

# Training images per site; 1361 in all.
SITE_SIZES = {1: 8, 2: 32, 3: 128, 4: 512, 5: 8, 6: 32, 7: 128, 8: 512, 9: 1}
BATCH_SIZES = {1: 4, 2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8, 9: 1}
N_VALIDATION, N_TESTING = 200, 1382
# Sizes that stay as they are in a smaller set: what leaks most is to stay comparable.
FIXED_SITES = (1, 5, 9)
SMALLEST_SITE, SMALLEST_TESTING = 8, 32
# Fewer public images would say too little about how patients differ.
SMALLEST_VALIDATION = 100
CLASS_FOLDERS = ("normal", "opacity")
# Lists are PREFIX + site + ".json", as published.
LIST_PREFIX = "data_200val+rest_client"
PRIOR_FILE = "prior.png"
CACHE_VARIABLE = "GRADINVBENCH_CACHE"
# Part of the cached folder's name: a changed phantom is a new folder.
VERSION = 1


@dataclass(frozen=True)
class PhantomSizes:
    """How many images each section holds.

    Attributes:
        sites: Training images by site.
        validation: Images all sites validate on.
        testing: Images all sites test on.
    """

    sites: dict[int, int]
    validation: int
    testing: int


def phantom_sizes(scale: float) -> PhantomSizes:
    """The published sizes times `scale`; sites 1, 5 and 9 stay as they are.

    Raises:
        InputError: A scale outside (0, 1].
    """
    if not 0 < scale <= 1:
        raise InputError(f"--scale {scale}: must be above 0 and at most 1")
    sites = {
        site: n if site in FIXED_SITES else min(n, max(SMALLEST_SITE, round(n * scale)))
        for site, n in SITE_SIZES.items()
    }
    validation = max(SMALLEST_VALIDATION, round(N_VALIDATION * scale))
    testing = max(SMALLEST_TESTING, round(N_TESTING * scale))
    return PhantomSizes(sites, validation, testing)


def make_phantoms(
    output: str | Path, *, scale: float = 1.0, size: int = 64, seed: int = 0
) -> dict[str, int]:
    """Draw the phantoms, their lists and the prior image into a folder.

    Every image is a patient of its own. A patient is a function of the seed and his
    place in the full data set: a smaller set holds some of the same patients.

    Args:
        output: Folder to write.
        scale: Share of the published sizes, see `phantom_sizes`.
        size: Side in pixels.
        seed: Seed that decides all patients.

    Returns:
        Number of images by section or site.

    Raises:
        InputError: An impossible scale or size.
    """
    sizes = phantom_sizes(scale)
    if not 16 <= size <= 512:
        raise InputError(f"--size {size}: must lie between 16 and 512 pixels")
    folder = Path(output)
    pictures = _Pictures(folder, size, seed)
    validation = pictures.section(0, sizes.validation)
    Image.fromarray(pictures.mean()).save(folder / PRIOR_FILE)
    testing = pictures.section(N_VALIDATION, sizes.testing)
    first = N_VALIDATION + N_TESTING
    for site, n in SITE_SIZES.items():
        training = pictures.section(first, sizes.sites[site])
        write_datalist(
            folder / f"{LIST_PREFIX}{site}.json",
            {"training": training, "validation": validation, "testing": testing},
        )
        first += n
    counts = {f"site-{site}": n for site, n in sizes.sites.items()}
    return {**counts, "validation": sizes.validation, "testing": sizes.testing}


class _Pictures:
    """Writes patients and sums them up."""

    def __init__(self, folder: Path, size: int, seed: int) -> None:
        self.folder, self.size, self.seed = folder, size, seed
        self.total, self.count = np.zeros((size, size)), 0
        for name in CLASS_FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)

    def section(self, first: int, n: int) -> list[Sample]:
        """Patients `first` to `first + n`, both classes in turn."""
        return [self._patient(first + index, index % len(CLASS_FOLDERS)) for index in range(n)]

    def _patient(self, number: int, label: int) -> Sample:
        rng = np.random.default_rng([self.seed, number])
        picture = chest_radiograph(self.size, bool(label), rng)
        self.total += picture
        self.count += 1
        name = f"{CLASS_FOLDERS[label]}/patient-{number:05d}.png"
        Image.fromarray(picture).save(self.folder / name)
        return Sample(name, label)

    def mean(self) -> np.ndarray:
        """The mean of the pictures so far, size x size grey values."""
        return np.round(self.total / self.count).astype(np.uint8)


def cache_folder() -> Path:
    """Where generated data is kept between runs.

    `GRADINVBENCH_CACHE`, or `gradinvbench` in the user's cache folder (`XDG_CACHE_HOME`).
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gradinvbench"


def cached_phantoms(scale: float = 1.0, size: int = 64, seed: int = 0) -> Path:
    """The folder with such phantoms, drawn now if they are not there yet.

    Several processes may ask at once: a folder appears whole or not at all.

    Raises:
        InputError: An impossible scale or size.
    """
    folder = cache_folder() / f"phantoms-v{VERSION}-{size}px-scale{scale:g}-seed{seed}"
    if not folder.is_dir():
        with _temporary_beside(folder) as temporary:
            make_phantoms(temporary, scale=scale, size=size, seed=seed)
            # Another process may have been faster; its folder is the same.
            with contextlib.suppress(OSError):
                temporary.rename(folder)
    return folder


@contextlib.contextmanager
def _temporary_beside(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    temporary.chmod(0o755)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
