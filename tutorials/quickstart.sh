#!/usr/bin/env bash
# From nothing to volumes in ChimeraX with simulated data: five commands, under ten minutes on two CPU cores.
# Run by `make quickstart`; every line also works when typed by hand after `source .venv/bin/activate`.
set -euo pipefail
out=${1:-quickstart}
began=$(date +%s)
say() { printf '\n== %s\n' "$*"; }

rm -rf "$out"
mkdir -p "$out"

say "1/5 simulate: noisy images of six made-up protein complexes, with their true shapes"
cryosuite simulate -o "$out/sim" --structures phantom:6 -n 3000 -D 32 --Apix 10 --snr 0.1 --seed 1

say "2/5 preprocess: normalise the images into a work folder"
cryosuite preprocess "$out/sim/particles.star" -D 32 -o "$out/work"

say "3/5 train-hype: learn one volume per image"
cryosuite train-hype "$out/work" -o "$out/run" -n 25

say "4/5 analyze: UMAP, clusters, volumes, pictures, ChimeraX script"
cryosuite analyze "$out/run" --ksample 6

say "5/5 eval-fsc: how close are the volumes to the truth?"
cryosuite eval-fsc "$out/run" --oracle

analysis=$(ls -d "$out"/run/analyze.* | tail -n 1)
say "done in $(($(date +%s) - began)) s"
echo "UMAP:            $analysis/umap.png"
echo "volumes:         $analysis/kmeans6/vol_*.mrc"
echo "one picture:     $analysis/overview.png"
echo "ChimeraX script: $analysis/view.cxc   (open it in ChimeraX)"
echo "score:           $(ls "$out"/run/eval.*/scores.json), a table is above"
