#!/usr/bin/env bash
# Does fine-tuning with an auxiliary task make a detector more robust? About an hour on two CPU cores.
#   VGG_WEIGHTS=FILE bash results/fine_tuning/run.sh PICTURES      (after results/real_pictures/run.sh)
#
#   1. Fine-tune the pixel detector pixel_on_all for one epoch, with half of the images perturbed. In "frozen", RDN is
#      frozen. In "no_task", RDN is also trained. In "colorization" and "denoising", RDN is also trained with this
#      auxiliary task.
#   2. Train a new detector ("augmented") with a frozen RDN on perturbed images, for as many steps as pixel_on_all.
#   3. Score the validation pictures without perturbation and after JPEG, noise, blur and resizing.
#
# Environment: GPU (default: cpu).
# Writes ./output/fine_tuning. To refresh the tables, copy output/fine_tuning/scores/*.csv to results/fine_tuning/scores.
source "$(dirname "$0")/../../script/common.sh"
pictures=${1:?usage: bash results/fine_tuning/run.sh PICTURES}
find_python
gpu=${GPU:-cpu}
out=$root/output/fine_tuning
start=$root/output/real_pictures/pixel_on_all/last.pth.tar
rdn=$root/output/real_pictures/sr/x4/last.pth
[[ -f $start ]] || fail "found no $start: run results/real_pictures/run.sh first"
generators=()
for folder in "$pictures"/train/*/; do
    [[ "$(basename "$folder")" == real ]] || generators+=("$(basename "$folder")")
done

# detector NAME EPOCHS FLAG ...: train a detector on perturbed images of all generators, and score perturbed images.
detector() {
    local name=$1 epochs=$2
    shift 2
    train_once "$out/$name/$(printf %04d "$epochs").pth.tar" train_detector.py --arch resnet18 --no_dilation \
        --optimizer adamw --wd 0.05 --schedule cosine --batch-size 16 --crop-size 128 --augment-perturb \
        --epochs "$epochs" --save-every-epoch "$epochs" \
        --data-root-pos "$pictures/train/real" --data-root-neg "${generators[@]/#/$pictures/train/}" \
        --output-path "$out/$name" "$@"
    "$PYTHON" "$root/test.py" --gpu "$gpu" --resume "$out/$name/last.pth.tar" --crop-size 0 \
        --perturb none jpeg=90 jpeg=70 jpeg=50 noise=0.05 blur=1 resize=0.5 \
        --data-root-pos "$pictures/val/real" --data-root-neg "${generators[@]/#/$pictures/val/}" \
        --save_path "$out/scores/$name" >/dev/null
}

# In each fine-tuning, the learning rate of the classifier is lr * lr-sr = 5e-4. The learning rate of a trained RDN is 2e-5.
detector frozen 1 --init "$start" --fixed-sr --lr 5e-4 --lr-sr 1
detector no_task 1 --init "$start" --mode-sr none --lr 2e-5 --lr-sr 25
detector colorization 1 --init "$start" --mode-sr colorization --lr 2e-5 --lr-sr 25
detector denoising 1 --init "$start" --mode-sr denoising --lr 2e-5 --lr-sr 25
detector augmented 10 --fixed-sr --sr-weights-file "$rdn" --lr 1e-3 --lr-sr 1
tool report "$out"/scores/*.csv --markdown
