#!/usr/bin/env bash
# From a fresh clone to a trained model and pictures: makes .venv, installs, builds a toy checkpoint with FLUX.1's true
# structure, and trains it on twelve real photographs with the same command that trains the real model.
# Needs Python 3.11 or newer and a few minutes; no GPU and no downloads besides the packages.
set -eu
cd "$(dirname "$0")"
source tools/environment.sh
ensure_environment requirements.txt

OUT=output/quickstart
rm -rf "$OUT"
"$PYTHON" tools/make_toy_flux.py --output "$OUT/toy"

# All cores on an idle machine; OpenMP threads that outnumber free cores make everything slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')}"
echo
echo "accelerate launch flux_train.py --config_file configs/quickstart/flux.toml"
"$PYTHON" -m accelerate.commands.launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$OMP_NUM_THREADS" flux_train.py --config_file configs/quickstart/flux.toml "$@"

cat <<EOT

Done. Look at
  before and after    $OUT/sample/quickstart_contact_sheet.png
  loss curve          $OUT/quickstart_loss.png
  trained checkpoint  $OUT/quickstart.safetensors   (FLUX.1 single-file layout)
  every setting       $OUT/quickstart_config.toml
Next: the README tells how to train FLUX.1-dev on your own pictures with the same command.
EOT
