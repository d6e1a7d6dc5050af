"""Whose files an analysis may replace."""

from __future__ import annotations

import pytest
from test_analysis_run import PIXEL, D, latents

from cryosuite.analysis.run import AnalyzeOptions, analyze
from cryosuite.data.workdir import AnalysisDir
from cryosuite.errors import InputError


def test_what_other_commands_left_there_is_no_obstacle_but_other_volumes_are(tmp_path):
    z, out = latents()[0], AnalysisDir(tmp_path / "analyze.1")
    for folder in (out.landscape.path, out.trajectories / "line", out.path / "polish"):
        folder.mkdir(parents=True)
        (folder / "vol_000.mrc").touch()
    options = AnalyzeOptions(ksample=3, skip_umap=True, skip_volumes=True)
    analyze(z, None, out, PIXEL, D, options, epoch=1)
    assert out.summary.is_file() and (out.landscape.path / "vol_000.mrc").is_file()
    for name in ("kmeans3", "gmm-umap16-4", "pc1"):
        strange = AnalysisDir(tmp_path / name)
        (strange.path / name).mkdir(parents=True)
        (strange.path / name / "vol_000.mrc").touch()
        with pytest.raises(InputError, match=f"{name}/vol_000.mrc"):
            analyze(z, None, strange, PIXEL, D, options, epoch=1)
