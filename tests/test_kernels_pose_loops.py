"""The compiled loops of the pose search: the same bits, whether just compiled or taken from the disk."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEARCHED_ONCE = """
import hashlib, torch
from cryosuite.kernels import fourier
from cryosuite.kernels import pose_search
torch.set_num_threads(1)
torch.manual_seed(0)
source = pose_search.VolumeSource(torch.nn.functional.avg_pool3d(torch.randn(1, 1, 32, 32, 32), 5, 1, 2)[0], r_max=15)
points = len(fourier.half_disc(32, 15))
values, transfer = torch.randn(40, points, dtype=torch.complex64), torch.rand(40, points)
options = pose_search.SearchOptions(shift_extent=0.1, r_max=15, levels=3)
found = pose_search.search(source, values, transfer, torch.zeros(40, dtype=torch.int64), options)
print(hashlib.sha256(b"".join(part.numpy().tobytes() for part in vars(found).values())).hexdigest())
"""


@pytest.mark.slow
def test_code_fresh_from_the_compiler_and_code_from_the_disk_find_the_same_bits(tmp_path):
    pytest.importorskip("numba")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = [
        subprocess.run(
            [sys.executable, "-c", SEARCHED_ONCE], env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc")) and found[0].stdout == found[1].stdout
