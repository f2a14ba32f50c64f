#!/usr/bin/env bash
# The whole method at a small scale, on a laptop without a GPU:  bash script/quickstart.sh [GPU_ID]
# Makes example images, trains RDN on the real ones and a pixel detector on "nearest" fakes, tests it on held-out "nearest"
# and "bilinear" fakes; with VGG-19's ImageNet weights (VGG_WEIGHTS=FILE, or in torch hub's cache) also a detector on
# stage 4. What was done by an earlier call is not done again; for a new start: rm -r output/quickstart
# Writes output/quickstart. The images are small (128 pixels), and so are the networks (RDN 16/16/3/3, ResNet-18), trained
# for minutes: the numbers show that everything works, not how good the method is.
source "$(dirname "$0")/common.sh"
usage "${1:-cpu}"
find_python
began=$SECONDS
gpu=${1:-cpu} out=output/quickstart images=output/quickstart/images
mkdir -p "$out"

if [[ ! -f $images/settings.json ]]; then
    say "tools.example --out $images --size 128"
    "$PYTHON" -m tools.example --out $images --size 128
fi

# Step 1: the re-synthesizer. The perceptual loss (--vgg-lambda) is left out: VGG-19 costs a hundred times this RDN.
trained "$out/sr/x4/epoch_11.pth" train_sr.py \
    --train-file $images/train.txt --eval-file $images/val.txt --outputs-dir $out/sr \
    --num-features 16 --growth-rate 16 --num-blocks 3 --num-layers 3 --vgg-lambda 0 \
    --start interpolation --schedule cosine --clip-norm 0.5 --lr 2e-3 \
    --patch-size 16 --batch-size 2 --patches-per-image 2 --num-epochs 12 --num-save 12

# Step 2: detectors on the residuals of "nearest" fakes, RDN frozen. (Of images this small stage 5 has 8 x 8 values: too few.)
hub=${TORCH_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/torch}/hub/checkpoints/vgg19-dcbb9e9d.pth
[[ -n "${VGG_WEIGHTS:-}" || ! -f $hub ]] || VGG_WEIGHTS=$hub
detector() {
    trained "$out/$1/$(printf %04d "$2").pth.tar" train_detector.py --fixed-sr --sr-weights-file $out/sr/x4/best.pth \
        --arch resnet18 --no_dilation --lr-sr 1 --epochs "$2" --save-every-epoch "$2" \
        --data-root-pos $images/train/real --data-root-neg $images/train/nearest \
        --val-root-pos $images/val/real --val-root-neg $images/val/nearest --output-path "$out/$1" "${@:3}"
    say "test.py on held-out images"
    "$PYTHON" test.py --gpu "$gpu" --resume "$out/$1/last.pth.tar" --save_path "$out/scores/$1" \
        --data-root-pos $images/test/real --data-root-neg $images/test/nearest $images/test/bilinear >/dev/null
}
detector pixel 24 --lr 5e-3 --batch-size 16
[[ -z "${VGG_WEIGHTS:-}" ]] || detector stage4 40 --idx-stages 4 --lr 0.01 --schedule cosine --batch-size 32
"$PYTHON" test.py --gpu "$gpu" --resume $out/pixel/last.pth.tar --save_path $out/some \
    --input $images/test/{real,nearest,bilinear}/0000[01].png --save-residuals $out/residuals

echo
echo "Trained on nearest fakes, tested on held-out images (small networks, minutes of training):"
"$PYTHON" -m tools.report $(ls $out/scores/{pixel,stage4}.csv 2>/dev/null) --out $out/report
echo "figures: $(ls -d $out/scores/*.png $out/residuals $out/report/report.html | tr '\n' ' ')"
[[ -n "${VGG_WEIGHTS:-}" ]] || echo "VGG-19's stages are left out for want of its ImageNet weights; with them:" \
    "VGG_WEIGHTS=FILE bash script/quickstart.sh"
echo "TensorBoard: $PYTHON -m tensorboard.main --logdir $out"
say "done in $((SECONDS - began)) s"
