#!/usr/bin/env bash
# What fine-tuning does for robustness on real pictures, after script/real_pictures.sh, in about an hour on a CPU:
#   VGG_WEIGHTS=FILE bash script/robustness.sh PICTURES
# Fine-tunes the pixel detector trained on all generators for one epoch on the same pictures, half of them perturbed: with
# RDN frozen, and end to end without and with either auxiliary task; and trains another ("augmented") on perturbed ones
# from the start, for as many steps as the first had. Then scores the validation part as it is, and compressed, noisy,
# blurred and resized. Writes output/robustness; docs/results.md has the table.
source "$(dirname "$0")/common.sh"
pictures=${1:?usage: bash script/robustness.sh PICTURES}
find_python
gpu=${GPU:-cpu} out=output/robustness generators=()
for folder in "$pictures"/train/*/; do
    [[ "$(basename "$folder")" == real ]] || generators+=("$(basename "$folder")")
done
all=${generators[*]}
before=output/real_pictures/pixel_on_${all// /+}/last.pth.tar
[[ -f $before ]] || fail "no $before: run script/real_pictures.sh first"

# detector NAME EPOCHS FLAG ...
detector() {
    trained "$out/$1/$(printf %04d "$2").pth.tar" train_detector.py --arch resnet18 --no_dilation --optimizer adamw --wd 0.05 \
        --schedule cosine --batch-size 16 --crop-size 128 --epochs "$2" --save-every-epoch "$2" --augment-perturb "${@:3}" \
        --data-root-pos "$pictures/train/real" --data-root-neg "${generators[@]/#/$pictures/train/}" --output-path "$out/$1"
    "$PYTHON" test.py --gpu "$gpu" --resume "$out/$1/last.pth.tar" --crop-size 0 --save_path "$out/scores/$1" \
        --perturb none jpeg=90 jpeg=70 jpeg=50 noise=0.05 blur=1 resize=0.5 \
        --data-root-pos "$pictures/val/real" --data-root-neg "${generators[@]/#/$pictures/val/}" >/dev/null
}
# The classifier learns at lr * lr-sr = 5e-4 in all that are fine-tuned; RDN, where it learns, at 2e-5
detector frozen 1 --init "$before" --fixed-sr --lr 5e-4 --lr-sr 1
for task in none colorization denoising; do
    detector $task 1 --init "$before" --mode-sr $task --lr 2e-5 --lr-sr 25
done
detector augmented 10 --fixed-sr --sr-weights-file output/real_pictures/sr/x4/last.pth --lr 1e-3 --lr-sr 1
"$PYTHON" -m tools.report "$out"/scores/*.csv --markdown
