#!/usr/bin/env bash
# Train a calibrated detector on folders of your own pictures, on two CPU cores, and write a report.
#   bash script/train_folders.sh REAL_DIR GENERATED_DIR [GENERATED_DIR ...] [any flag of train_detector.py]
#
# The pictures may have any sizes of at least 128 x 128 pixels. The script holds out a fifth of the pictures. It trains a
# small RDN on the other real pictures, and a detector on crops of SIDE x SIDE pixels. Then it calibrates the detector on
# the held-out pictures.
#
# CLASSIFIER=spectrum trains a spectrum classifier on the signed pixel residual. Up-sampled copies of the real pictures are
#   added to the generated pictures, so that the classifier does not learn a single generator only. AUTOENCODER="ENCODER
#   DECODER" replaces the up-sampled copies by copies that this autoencoder makes ("twins"). CLASSIFIER=spectrum is the
#   default for fewer than 600 pictures, because a ResNet would memorise so few pictures.
# CLASSIFIER=resnet18 trains a ResNet-18 on the pixel residual or, if VGG_WEIGHTS is set, on the stage-4 residual of VGG-19,
#   which is robust to compression. CLASSIFIER=resnet18 is the default for 600 pictures or more.
# docs/results.md compares both. A second call resumes a call that was stopped. Another CLASSIFIER needs another OUT.
#
# Environment variables and defaults: OUT=output/folders, GPU=cpu, SIDE=128 (stage 4: 256), CROPS=4 for each picture
# (ResNet-18: 2, stage 4: 1), CLASSIFIER, AUTOENCODER="", VGG_WEIGHTS="".
source "$(dirname "$0")/common.sh"
folders=()
while [[ $# -gt 0 && "$1" != -* ]]; do
    folders+=("$1")
    shift
done
[[ ${#folders[@]} -ge 2 ]] ||
    fail "usage: bash script/train_folders.sh REAL_DIR GENERATED_DIR [GENERATED_DIR ...] [flags]"
[[ "${CLASSIFIER:-spectrum}" =~ ^(spectrum|resnet18)$ ]] ||
    fail "CLASSIFIER must be spectrum or resnet18, got $CLASSIFIER"
find_python
started=$SECONDS
out=${OUT:-$root/output/folders}
gpu=${GPU:-cpu}

# The first call counts the pictures. Later calls use the same number, so that a resumed training keeps its classifier.
mkdir -p "$out"
if [[ ! -f "$out/picture_count.txt" ]]; then
    count_images "${folders[@]}" >"$out/picture_count.tmp"
    mv "$out/picture_count.tmp" "$out/picture_count.txt"
fi
pictures=$(<"$out/picture_count.txt")
if [[ $pictures -lt 600 ]]; then
    classifier=${CLASSIFIER:-spectrum}
else
    classifier=${CLASSIFIER:-resnet18}
fi

if [[ $classifier == spectrum ]]; then
    learning=(--residual signed --arch spectrum --optimizer adamw --lr 2e-3 --wd 0.05)
    side=${SIDE:-128} crops=${CROPS:-4}
    steps=400 batch=64
    step_ms=1300 prepare_ms=500 # time of a training step and of the residual of one crop, on 256 x 256 pixels
    if [[ ! -d "$out/copies" ]]; then
        tool example --from "${folders[0]}" --out "$out/copies" ${AUTOENCODER:+--autoencoder $AUTOENCODER}
    fi
    folders+=("$out/copies")
elif [[ -z "${VGG_WEIGHTS:-}" ]]; then
    learning=(--arch resnet18 --no_dilation --optimizer adamw --lr 1e-3 --wd 0.05)
    side=${SIDE:-128} crops=${CROPS:-2}
    steps=760 batch=16
    step_ms=1500 prepare_ms=500
else
    learning=(--arch resnet18 --no_dilation --idx-stages 4 --lr 0.01)
    side=${SIDE:-256} crops=${CROPS:-1}
    steps=380 batch=32
    step_ms=200 prepare_ms=1500
fi

# Hold out a fifth of the pictures. The file name decides, so a picture and its copy are in the same set.
if [[ -f "$out/held_out.csv" ]]; then # the file that tools.split writes last
    say "using the pictures of $out/train.csv and $out/held_out.csv (to use other pictures, set OUT=ANOTHER_FOLDER)"
else
    tool split --data-root-pos "${folders[0]}" --data-root-neg "${folders[@]:1}" --out "$out"
fi
reals=$(wc -l <"$out/train_real.txt")
train=$(($(wc -l <"$out/train.csv") - 1))
rdn_epochs=$((10400 / reals + 1)) # about 2,600 steps of 4 patches, for any number of pictures
epochs=$((steps * batch / (train * crops) + 1))
minutes=$(((steps * step_ms + train * crops * prepare_ms) * side / 256 * side / 256 / 60000))
say "the training takes about $((6 + minutes)) minutes on two cores without a GPU"

# Train the re-synthesizer and the detector
train_once "$out/sr/x4/epoch_$((rdn_epochs - 1)).pth" train_sr.py \
    --train-file "$out/train_real.txt" --outputs-dir "$out/sr" \
    --num-features 16 --growth-rate 16 --num-blocks 4 --num-layers 4 --vgg-lambda 0 --start interpolation \
    --schedule cosine --clip-norm 0.5 --lr 2e-3 --batch-size 4 \
    --num-epochs "$rdn_epochs" --num-save "$rdn_epochs" --skip-bad
detector=$out/detector/last.pth.tar
train_once "$out/detector/$(printf %04d "$epochs").pth.tar" train_detector.py --fixed-sr \
    --sr-weights-file "$out/sr/x4/last.pth" "${learning[@]}" \
    --schedule cosine --lr-sr 1 --batch-size "$batch" --epochs "$epochs" --save-every-epoch "$epochs" \
    --crop-size "$side" --crops-per-image "$crops" --skip-bad \
    --csv "$out/train.csv" --val-csv "$out/held_out.csv" --output-path "$out/detector" "$@"

# Score the held-out pictures, fit the thresholds to these scores, and score again to get verdicts with these thresholds
score_held_out() {
    local status=0
    "$PYTHON" "$root/test.py" --gpu "$gpu" --resume "$detector" --csv "$out/held_out.csv" --save_path "$out/scores" \
        >/dev/null || status=$?
    [[ $status -le 1 ]] || exit "$status" # status 1: test.py has named pictures that it could not score
}
score_held_out
tool calibrate "$out/scores.csv" --into "$detector" --fpr 0.05
score_held_out
tool report "$out/scores.csv" --out "$out/report"
say "done in $((SECONDS - started)) s; to check a picture: $PYTHON $root/test.py --resume $detector --input PICTURE"
