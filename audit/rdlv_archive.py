"""The published tool's archive of one site's round, `rdvl_round{N}.npz`: written and read.

Source: `rdlv_io` of NVFlare's research example "Quantifying Data Leakage in Federated Learning",
https://github.com/NVIDIA/NVFlare/tree/main/research/quantifying-data-leakage; the names and the
keys are its, the code is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.array_files import read_arrays
from core.errors import InputError
from core.records import BROKEN
from core.storage import atomic_file

Values = np.ndarray | torch.Tensor | Sequence[Any]
KEYS = ("img_recon_sim_reduced", "img_recon_sim", "has_closest_idx", "site", "round")


@dataclass(frozen=True)
class RdlvArchive:
    """What an archive holds.

    Attributes:
        site: Name of the site.
        round_number: From 0.
        reduced: N x K, the best reconstruction's value by image and metric.
        values: N x M x K of every image, reconstruction and metric.
        closest: N x K numbers of the best reconstructions; None where nothing was reduced.
        matches: Images and their best reconstructions, where they were kept.
    """

    site: str
    round_number: int
    reduced: np.ndarray
    values: np.ndarray
    closest: np.ndarray | None
    matches: tuple[np.ndarray, np.ndarray] | None


def write_archive(
    path: str | Path,
    reduced: Values,
    values: Values,
    closest: Values | None,
    site: str,
    round_number: int,
    best_matches: Sequence[Sequence[Values]] | None = None,
) -> None:
    """Write an archive, atomically.

    Args:
        path: The file.
        reduced: N x K.
        values: N x M x K.
        closest: N x K, or None.
        site: Name of the site.
        round_number: From 0.
        best_matches: N pairs of an image and its reconstruction.
    """
    arrays = {
        "img_recon_sim_reduced": _array(reduced),
        "img_recon_sim": _array(values),
        "has_closest_idx": np.asarray(closest is not None),
        "site": np.asarray(site),
        "round": np.asarray(round_number),
    }
    if closest is not None:
        arrays["closest_idx"] = _array(closest)
    if best_matches is not None:
        arrays["best_match_inputs"] = np.stack([_array(image) for image, _ in best_matches])
        arrays["best_match_recons"] = np.stack([_array(found) for _, found in best_matches])
    with atomic_file(Path(path)) as file:
        # By keyword, as numpy has it; no key of ours is one of its own.
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_archive(path: str | Path) -> RdlvArchive:
    """Read an archive. Nothing in it is run.

    Raises:
        InputError: It is none, or is damaged.
    """
    arrays = read_arrays(path)
    try:
        return _parsed(arrays)
    except BROKEN as error:
        raise InputError(f"the leakage archive {path} is broken ({error!r:.200})") from None


def _parsed(arrays: Mapping[str, np.ndarray]) -> RdlvArchive:
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    reduced = _numbers(arrays, "img_recon_sim_reduced")
    if reduced.ndim == 1:
        reduced = reduced[:, None]
    if reduced.ndim < 2 or not reduced.shape[-1]:
        raise ValueError(f"values of shape {reduced.shape}")
    matches = None
    if "best_match_recons" in arrays:
        matches = arrays["best_match_inputs"], arrays["best_match_recons"]
    return RdlvArchive(
        site=str(arrays["site"].item()),
        round_number=int(arrays["round"].item()),
        # What was not reduced keeps one row per image and reconstruction.
        reduced=reduced.reshape(-1, reduced.shape[-1]),
        values=_numbers(arrays, "img_recon_sim"),
        closest=arrays["closest_idx"] if arrays["has_closest_idx"].item() else None,
        matches=matches,
    )


def _numbers(arrays: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    if arrays[key].dtype.kind not in "fiu":
        raise ValueError(f"{key} holds {arrays[key].dtype}")
    return arrays[key].astype(float)


def _array(values: Values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    return np.asarray(values)
