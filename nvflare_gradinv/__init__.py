"""Names of `federated` as published job folders and commands spell them.

Nothing lives here: `nvflare_gradinv.GaussianPrivacy` is `federated.GaussianPrivacy`, and
`python -m nvflare_gradinv.utils.create_job_config` is `python -m federated.create_job_config`.
"""

from typing import Any

import federated

__all__ = federated.__all__


def __getattr__(name: str) -> Any:
    """The component of this name, imported when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(federated, name)
