#!/usr/bin/env bash
# Train and test small networks on a laptop without a GPU.
#   bash script/quickstart.sh [GPU_ID]
#
# The script makes example images, trains RDN on the real images, and trains a pixel detector on real images and "nearest"
# fakes. Then it tests the detector on other real images, "nearest" fakes and "bilinear" fakes. If the ImageNet weights of
# VGG-19 are given (VGG_WEIGHTS=FILE) or in the cache of torch.hub, it also trains a detector on stage 4 of VGG-19.
# A second call skips each training that is finished. To start again: rm -r output/quickstart
# Output: ./output/quickstart
# The images (128 x 128 pixels) and the networks (RDN 16/16/3/3, ResNet-18) are small, and each training takes minutes. The
# results show that the programs work. They do not show how accurate the method is.
source "$(dirname "$0")/common.sh"
check_gpu_argument "${1:-cpu}"
find_python
started=$SECONDS
gpu=${1:-cpu}
out=$root/output/quickstart
images=$out/images
mkdir -p "$out"

if [[ ! -f $images/settings.json ]]; then
    say "making example images in $images"
    tool example --out "$images" --size 128
fi

# Step 1: train the re-synthesizer. The perceptual loss is off (--vgg-lambda 0), because VGG-19 needs a hundred
# times the computation of this RDN.
train_once "$out/sr/x4/epoch_11.pth" train_sr.py \
    --train-file "$images/train.txt" --eval-file "$images/val.txt" --outputs-dir "$out/sr" \
    --num-features 16 --growth-rate 16 --num-blocks 3 --num-layers 3 --vgg-lambda 0 \
    --start interpolation --schedule cosine --clip-norm 0.5 --lr 2e-3 \
    --patch-size 16 --batch-size 2 --patches-per-image 2 --num-epochs 12 --num-save 12

# Step 2: train detectors with a frozen RDN. Stage 5 is left out, because it has only 8 x 8 values for these small images.
vgg_in_cache=${TORCH_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/torch}/hub/checkpoints/vgg19-dcbb9e9d.pth
if [[ -z "${VGG_WEIGHTS:-}" && -f $vgg_in_cache ]]; then
    VGG_WEIGHTS=$vgg_in_cache
fi

# detector NAME EPOCHS FLAG ...: train a detector on "nearest" fakes, and score held-out images with both kinds of fakes.
detector() {
    local name=$1 epochs=$2
    shift 2
    train_once "$out/$name/$(printf %04d "$epochs").pth.tar" train_detector.py --fixed-sr \
        --sr-weights-file "$out/sr/x4/best.pth" --arch resnet18 --no_dilation --lr-sr 1 \
        --epochs "$epochs" --save-every-epoch "$epochs" \
        --data-root-pos "$images/train/real" --data-root-neg "$images/train/nearest" \
        --val-root-pos "$images/val/real" --val-root-neg "$images/val/nearest" --output-path "$out/$name" "$@"
    say "scoring held-out images with test.py"
    "$PYTHON" "$root/test.py" --gpu "$gpu" --resume "$out/$name/last.pth.tar" --save_path "$out/scores/$name" \
        --data-root-pos "$images/test/real" --data-root-neg "$images/test/nearest" "$images/test/bilinear" >/dev/null
}
detector pixel 12 --lr 5e-3 --batch-size 16
tables=("$out/scores/pixel.csv")
if [[ -n "${VGG_WEIGHTS:-}" ]]; then
    detector stage4 40 --idx-stages 4 --lr 0.01 --schedule cosine --batch-size 32
    tables+=("$out/scores/stage4.csv")
fi

# Step 3: make pictures of residuals and a report.
"$PYTHON" "$root/test.py" --gpu "$gpu" --resume "$out/pixel/last.pth.tar" --save_path "$out/some" \
    --input "$images"/test/{real,nearest,bilinear}/0000[01].png --save-residuals "$out/residuals"
echo
echo "Trained on nearest fakes, tested on held-out images (small networks, minutes of training):"
tool report "${tables[@]}" --out "$out/report"
echo "figures: $(echo "$out"/scores/*.png) $out/residuals $out/report/report.html"
if [[ -z "${VGG_WEIGHTS:-}" ]]; then
    echo "No stage-4 detector without the ImageNet weights of VGG-19: VGG_WEIGHTS=FILE bash script/quickstart.sh"
fi
echo "TensorBoard: $PYTHON -m tensorboard.main --logdir $out"
say "done in $((SECONDS - started)) s"
