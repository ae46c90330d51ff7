#!/usr/bin/env bash
# From a fresh clone to a trained model and pictures: makes .venv, installs, builds a toy checkpoint with the true structure of
# FLUX.1 (or of SDXL, SD3, Lumina: bash quickstart.sh sdxl), and trains it on twelve real photographs with the same command that
# trains the real model. Needs Python 3.11 or newer and a few minutes; no GPU and no downloads besides the packages.
set -eu
cd "$(dirname "$0")"

MODEL=flux
case "${1:-}" in
    flux | sdxl | sd3 | lumina) MODEL=$1; shift ;;
    -* | "") ;; # flags of the training script
    *) echo "error: no quickstart for '$1'; use: bash quickstart.sh [flux|sdxl|sd3|lumina] [flags of the script]" >&2; exit 2 ;;
esac
case $MODEL in
    flux) OUT=output/quickstart TITLE=FLUX.1-dev LAYOUT="FLUX.1 single-file layout" ;;
    sdxl) OUT=output/quickstart_sdxl TITLE=SDXL LAYOUT="SDXL single-file layout, everything in it" ;;
    sd3) OUT=output/quickstart_sd3 TITLE=SD3 LAYOUT="SD3 single-file layout" ;;
    lumina) OUT=output/quickstart_lumina TITLE="Lumina-Image 2.0" LAYOUT="Lumina-Image 2.0 single-file layout" ;;
esac

source tools/environment.sh
ensure_environment requirements.txt

rm -rf "$OUT"
"$PYTHON" "tools/make_toy_$MODEL.py" --output "$OUT/toy"

# All cores on an idle machine; OpenMP threads that outnumber free cores make everything slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')}"
echo
echo "accelerate launch ${MODEL}_train.py --config_file configs/quickstart/$MODEL.toml"
"$PYTHON" -m accelerate.commands.launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$OMP_NUM_THREADS" "${MODEL}_train.py" --config_file "configs/quickstart/$MODEL.toml" "$@"

cat <<EOT

Done. Look at
  before and after    $OUT/sample/quickstart_contact_sheet.png
  the run on a page   $OUT/quickstart_report.html
  loss curve          $OUT/quickstart_loss.png
  trained checkpoint  $OUT/quickstart.safetensors   ($LAYOUT)
  every setting       $OUT/quickstart_config.toml
Next: the README tells how to train $TITLE on your own pictures with the same command.
EOT
