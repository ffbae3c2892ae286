"""Published module path of the archive of one site's round, see `audit.rdlv_archive`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audit.rdlv_archive import Values, read_archive, write_archive

__all__ = ["load_rdlv_results", "save_rdlv_results"]


def save_rdlv_results(
    save_path: str | Path,
    img_recon_sim_reduced: Values,
    img_recon_sim: Values,
    closest_idx: Values | None,
    site: str,
    round_number: int,
    best_matches: Sequence[Sequence[Values]] | None = None,
) -> None:
    """Write an archive, see `audit.rdlv_archive.write_archive`."""
    write_archive(
        # As numpy, which the published function leaves the ending to.
        save_path if str(save_path).endswith(".npz") else f"{save_path}.npz",
        img_recon_sim_reduced,
        img_recon_sim,
        closest_idx,
        site,
        round_number,
        best_matches,
    )


def load_rdlv_results(result_path: str | Path) -> dict[str, Any]:
    """The archive's values under their published keys.

    Raises:
        InputError: It is none, or is damaged.
    """
    found = read_archive(result_path)
    loaded: dict[str, Any] = {
        "img_recon_sim_reduced": found.reduced,
        "img_recon_sim": found.values,
        "closest_idx": None if found.closest is None else np.asarray(found.closest),
        "site": found.site,
        "round": found.round_number,
    }
    if found.matches is not None:
        loaded["best_match_inputs"], loaded["best_match_recons"] = found.matches
    return loaded
