"""The map networks that come with the package: there, with a card, and better than the map they are given."""

from __future__ import annotations

import pytest
import torch

from cryosuite.data.map_weights import TASKS, VOXELS, load_map_weights, shipped_map_weights
from cryosuite.methods.lvm_loader import CropBatch
from cryosuite.methods.lvm_validate import map_scores, restored
from cryosuite.simulate.map_options import PairOptions
from cryosuite.simulate.map_pairs import MapPairs


@pytest.mark.parametrize("task", TASKS)
def test_there_with_a_card_and_better_than_the_map_given(task):
    path = shipped_map_weights(task)
    found = load_map_weights(path)
    assert found.task == task and found.voxel == VOXELS[task] and path.stat().st_size < 5e6
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert f"Map network for {task}" in card and f"{found.notes['images_seen']:,} of 32^3" in card
    told = found.notes["scores"]
    assert told["cc_mask"] > told["cc_mask_input"] and told["mse"] < told["mse_input"]
    assert f"{told['cc_mask']:.4f}" in card and f"{told['cc_mask_input']:.4f}" in card
    made = {"norm": found.norm, "spectrum": found.spectrum}  # as they are shown maps by lvm-sharpen
    options = PairOptions(task=task, crop=32, crops_per_volume=3, nothing=0.0, clean=0.0, **made)
    pairs = MapPairs.open("phantom:4", options)
    batch = CropBatch.of([pairs.draw(torch.Generator().manual_seed(seed)) for seed in range(1000, 1005)])
    ours, given = map_scores(restored(found.net, batch.input), batch), map_scores(batch.input, batch)
    assert ours["cc_mask"] > given["cc_mask"] + 0.01 and ours["mse"] < given["mse"]
