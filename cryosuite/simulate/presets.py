"""Named sets: the mini sets that quality is reported on, and CryoBench's settings. Values are command-line options."""

from __future__ import annotations

from typing import Any

from cryosuite.errors import InputError
from cryosuite.simulate.recipes import RIBO_BLOCKS

MIX16 = "1igy,1hzh,1xnr,6vxx,1kx5,8zzi,4y08,5gjv,1tr2,1t6b,3d2f,1e4m,3eiy,3wip,4r8p,7drt"

# residue numbers of 1IGY are those of the sequence (label_seq_id): author 220 is 208 there, the hinge about 209
_IGG: dict[str, Any] = {
    "structures": "1igy", "recipe": "loop", "moving": "A,B:1-208", "hinge": "B:206-212",
    "towards": "B:213-434,D:213-434",
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "mini-mix16": {"structures": MIX16, "recipe": "mix", "n": 2400},
    "mini-ribo16": {
        "structures": "1xnr", "recipe": "assembly", "blocks": RIBO_BLOCKS, "states": 16, "n": 2400,
        "occupancies": "ribosembly", "min_images": 20,
    },
    "mini-igg10": {**_IGG, "states": 10, "n": 2400},
    "mini-igg50": {**_IGG, "states": 50, "n": 10_000},
}  # fmt: skip

# CryoBench: box 256 cropped to 128 at 3 A, B = 100, particles sorted by state
CRYOBENCH: dict[str, Any] = {
    "box_size": 128, "apix": 3.0, "resolution": 3.0, "bfactor": 100.0, "snr": 0.01, "sorted_by_state": True,
}  # fmt: skip


def preset(name: str) -> dict[str, Any]:
    """The options of a named set.

    Raises:
        InputError: unknown name.
    """
    if name not in PRESETS:
        raise InputError(f"--preset {name}: unknown; there are {', '.join(PRESETS)}.")
    return PRESETS[name]
