"""The network that ships with the package does what its card says, as far as seconds allow to see."""

import json

import torch

from cryosuite.data.multiview_weights import shipped_multiview
from cryosuite.methods.fastar import Fastar, FastarModel
from cryosuite.methods.fastar_options import HELD_OUT, preset
from cryosuite.methods.fastar_validate import Case
from cryosuite.simulate.view_sets import ViewOptions, ViewSets


def test_it_poses_molecules_never_seen_far_better_than_chance():
    net, _ = shipped_multiview("fastar-micro")
    options = preset("micro").options
    model = FastarModel(options)
    model.net = net
    views = ViewOptions(images=48, views=(48, 48), snr=(10.0, 10.0), ctf=0.0, cones=0.0, neighbours=0.0)
    case = Case(ViewSets(views, seed=HELD_OUT + 1), 0, 1, "phantom")  # 576 cells 30 degrees apart
    found = case.errors(model.eval(), Fastar(options), torch.Generator().manual_seed(0), {})
    assert found["deg"].median() < 20 and found["chance"].median() > 90
    assert found["shift"].median() < 1.5  # pixels of 32


def test_its_notes_say_what_it_is_and_hold_no_folders():
    net, notes = shipped_multiview("fastar-micro")
    assert notes["mode"] == "target" and "match" in notes["answers"] and net.spec.size == 32
    assert notes["command"].startswith("cryosuite train-fastar") and int(notes["images_seen"]) > 100_000
    assert "structure_snr1_chance" in json.loads(notes["scores"])
    assert all("/work" not in value and "/home" not in value for value in notes.values())
