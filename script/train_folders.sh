#!/usr/bin/env bash
# From folders of pictures to a calibrated detector and a report, on two CPU cores:
#   bash script/train_folders.sh REAL_DIR GENERATED_DIR [GENERATED_DIR ...] [any flag of train_detector.py]
# For a few hundred pictures of any and mixed sizes from SIDE x SIDE pixels on (below: 256). Holds a fifth of them out,
# trains a small RDN on the other reals, a detector on crops, calibrates it on what was held out, and writes a report.
# A call that was stopped goes on. Environment: OUT (output/folders), GPU (cpu), SIDE (256), CROPS (1) of each picture,
# VGG_WEIGHTS (with it, a stage-5 detector is trained beside the pixel detector).
source "$(dirname "$0")/common.sh"
folders=()
while [[ $# -gt 0 && "$1" != -* ]]; do folders+=("$1"); shift; done
[[ ${#folders[@]} -ge 2 ]] || fail "usage: bash script/train_folders.sh REAL_DIR GENERATED_DIR [GENERATED_DIR ...] [flags]"
find_python
out=${OUT:-output/folders} gpu=${GPU:-cpu} side=${SIDE:-256} crops=${CROPS:-1}
began=$SECONDS

"$PYTHON" -m data.split --data-root-pos "${folders[0]}" --data-root-neg "${folders[@]:1}" --out "$out"
images=$(($(wc -l <"$out/train.csv") + $(wc -l <"$out/held_out.csv") - 2)) reals=$(wc -l <"$out/train_real.txt")
# RDN takes about 11,000 steps of 4 patches, whatever the number of pictures.
epochs=$((44000 / reals + 1))
say "about $((20 + images * crops / 100)) minutes on two cores without a GPU: RDN 20, the rest for $images pictures"

trained "$out/sr/x4/epoch_$((epochs - 1)).pth" train_sr.py --train-file "$out/train_real.txt" \
    --eval-file "$out/held_out_real.txt" --outputs-dir "$out/sr" --num-features 32 --growth-rate 32 --num-blocks 4 \
    --num-layers 4 --vgg-lambda 0 --start interpolation --schedule cosine --clip-norm 0.5 --lr 2e-3 --batch-size 4 \
    --num-epochs "$epochs" --num-save "$epochs" --skip-bad
