#!/usr/bin/env bash
# From folders of pictures to a calibrated detector and a report, on two CPU cores:
#   bash script/train_folders.sh REAL_DIR GENERATED_DIR [GENERATED_DIR ...] [any flag of train_detector.py]
# For a few hundred pictures of any and mixed sizes from 128 x 128 pixels on. Holds a fifth of them out, trains a small
# RDN on the other reals and a detector on crops of SIDE x SIDE pixels, calibrates it on what was held out and writes a
# report. With VGG_WEIGHTS the detector looks at VGG-19's stage 4 (pictures from 256 x 256 on), which survives compression
# and carries over to some other generators (--idx-stages 5: to more, but it tells less of these), else at the pixels, which
# tell most of clean pictures of these generators (docs/results.md). A call that was stopped goes on. Environment: OUT
# (output/folders), GPU (cpu), SIDE, CROPS of each picture, VGG_WEIGHTS.
source "$(dirname "$0")/common.sh"
folders=()
while [[ $# -gt 0 && "$1" != -* ]]; do folders+=("$1"); shift; done
[[ ${#folders[@]} -ge 2 ]] || fail "usage: bash script/train_folders.sh REAL_DIR GENERATED_DIR [GENERATED_DIR ...] [flags]"
find_python
out=${OUT:-output/folders} gpu=${GPU:-cpu} began=$SECONDS
# How the classifier learns, the steps that takes, images a step; milliseconds: of 256 x 256 pixels, a step and to prepare
if [[ -z "${VGG_WEIGHTS:-}" ]]; then
    learning=(--idx-stages 0 --optimizer adamw --lr 1e-3 --wd 0.05) side=${SIDE:-128} crops=${CROPS:-2}
    steps=760 batch=16 step=1500 prepare=500
else
    learning=(--idx-stages 4 --lr 0.01) side=${SIDE:-256} crops=${CROPS:-1}
    steps=380 batch=32 step=200 prepare=1500
fi

if [[ -f "$out/train.csv" ]]; then
    say "going on with the pictures of $out/train.csv and $out/held_out.csv (for others: OUT=ANOTHER_FOLDER)"
else
    "$PYTHON" -m tools.split --data-root-pos "${folders[0]}" --data-root-neg "${folders[@]:1}" --out "$out"
fi
reals=$(wc -l <"$out/train_real.txt") train=$(($(wc -l <"$out/train.csv") - 1))
rounds=$((10400 / reals + 1)) # RDN takes about 2,600 steps of 4 patches, however many pictures there are
epochs=$((steps * batch / (train * crops) + 1))
minutes=$(((steps * step + train * crops * prepare) * side / 256 * side / 256 / 60000))
say "about $((6 + minutes)) minutes on two cores without a GPU"

trained "$out/sr/x4/epoch_$((rounds - 1)).pth" train_sr.py --train-file "$out/train_real.txt" \
    --eval-file "$out/held_out_real.txt" --outputs-dir "$out/sr" --num-features 16 --growth-rate 16 --num-blocks 4 \
    --num-layers 4 --vgg-lambda 0 --start interpolation --schedule cosine --clip-norm 0.5 --lr 2e-3 --batch-size 4 \
    --num-epochs "$rounds" --num-save "$rounds" --skip-bad
detector=$out/detector/last.pth.tar
trained "$out/detector/$(printf %04d $epochs).pth.tar" train_detector.py --fixed-sr --sr-weights-file "$out/sr/x4/last.pth" \
    --arch resnet18 --no_dilation "${learning[@]}" --schedule cosine --lr-sr 1 --batch-size "$batch" \
    --epochs $epochs --save-every-epoch $epochs --crop-size "$side" --crops-per-image "$crops" --skip-bad \
    --csv "$out/train.csv" --val-csv "$out/held_out.csv" --output-path "$out/detector" "$@"

held_out() {
    "$PYTHON" test.py --gpu "$gpu" --resume "$detector" --csv "$out/held_out.csv" --save_path "$out/scores" >/dev/null ||
        [[ $? -eq 1 ]] # some pictures could not be scored: said above
}
held_out
"$PYTHON" -m tools.calibrate "$out/scores.csv" --into "$detector" --fpr 0.05
held_out # with the verdicts of the calibrated detector
"$PYTHON" -m tools.report "$out/scores.csv" --out "$out/report"
say "done in $((SECONDS - began)) s; is this picture generated?  python test.py --resume $detector --input PICTURE"
