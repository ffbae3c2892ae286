"""Published settings that more than one attack starts from."""

from attack.settings import InversionConfig

SPECTRAL = InversionConfig(
    iterations=2000,
    lr=0.2,
    lr_min=0.0,
    signed=False,
    tv=1.0,
    tv_kind="double-opponents",
    balance=0.5,
    balance_end=0.05,
    balance_hold=0.002,
    coordinates="dct",
    race=8,
)
SPECTRAL_2 = SPECTRAL.changed(keep_contrast=True)
SPECTRAL_3 = SPECTRAL.changed(natural_scale=True)
DLG = InversionConfig(
    objective="L2",
    optimizer="LBFGS",
    lr=1.0,
    schedule="constant",
    iterations=300,
    signed=False,
    tv=0.0,
    box=False,
    joint_labels=True,
    hvp="exact",
)
