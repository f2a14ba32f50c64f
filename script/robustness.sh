#!/usr/bin/env bash
# What fine-tuning does for robustness, at a small scale:  bash script/robustness.sh [GPU_ID]
# Fine-tunes the quickstart's pixel detector (made first where it is missing) on more example images, half of them
# perturbed: with RDN frozen, and end to end without and with either auxiliary task. Then tests all five detectors under
# blur, JPEG, noise and resizing and prints a table. What was done by an earlier call is not done again.
# Writes output/robustness; docs/results.md has the table and the time it took.
source "$(dirname "$0")/common.sh"
usage "${1:-cpu}"
find_python
began=$SECONDS
gpu=${1:-cpu} out=output/robustness images=output/robustness/images before=output/quickstart/pixel/last.pth.tar
[[ -f $before ]] || bash script/quickstart.sh "$gpu"
mkdir -p "$out"

if [[ ! -f $images/settings.json ]]; then
    say "data.example --out $images --size 128 --train 384 --val 64 --test 192"
    "$PYTHON" -m data.example --out $images --size 128 --train 384 --val 64 --test 192
fi

# fine_tuned NAME FLAG ...: 8 epochs. The classifier learns at lr * lr-sr = 2e-3 in all of them; RDN, where it learns at
# all, at 2e-5 (at 1e-4 it drifts, and the detector gets worse).
fine_tuned() {
    local name=$1
    shift
    trained "$out/$name/0008.pth.tar" train_detector.py --init $before --no_dilation --batch-size 16 --epochs 8 \
        --save-every-epoch 8 --augment-perturb --precision bf16 "$@" \
        --data-root-pos $images/train/real --data-root-neg $images/train/nearest --output-path "$out/$name"
}
fine_tuned frozen --fixed-sr --lr 2e-3 --lr-sr 1
for task in none colorization denoising; do
    fine_tuned $task --mode-sr $task --lr 2e-5 --lr-sr 100
done

# swept NAME DETECTOR: scores under every strength of every perturbation
swept() {
    say "test.py --perturb all: $1"
    "$PYTHON" test.py --gpu "$gpu" --resume "$2" --perturb all \
        --save_path "$out/scores/$1" --data-root-pos $images/test/real \
        --data-root-neg $images/test/nearest $images/test/bilinear >/dev/null
}
swept before $before
for name in frozen none colorization denoising; do
    swept $name "$out/$name/last.pth.tar"
done
"$PYTHON" -m utils.report "$out"/scores/*_{none,jpeg_quality_90,jpeg_quality_70,jpeg_quality_50,noise_std_0.05,blur_sigma_1}.csv \
    --markdown
say "done in $((SECONDS - began)) s"
