#!/usr/bin/env bash
# The whole method at a small scale, on a laptop without a GPU:  bash script/quickstart.sh [GPU_ID]
# Makes example images, trains RDN on the real ones and a pixel detector (with VGG-19's weights at hand a stage-5 one, too)
# on "nearest" fakes, tests them on held-out "nearest" and "bilinear" fakes. What was done by an earlier call is not done
# again; for a new start: rm -r output/quickstart
# Writes output/quickstart. The images are small (128 pixels), and so are the networks (RDN 16/16/3/3, ResNet-18), trained
# for minutes: the numbers show that everything works, not how good the method is.
source "$(dirname "$0")/common.sh"
usage "${1:-cpu}"
find_python
began=$SECONDS
gpu=${1:-cpu} out=output/quickstart images=output/quickstart/images
mkdir -p "$out"

if [[ ! -f $images/settings.json ]]; then
    say "data.example --out $images --size 128"
    "$PYTHON" -m data.example --out $images --size 128
fi

# Step 1: the re-synthesizer. The perceptual loss (--vgg-lambda) is left out: VGG-19 costs a hundred times this RDN.
trained "$out/sr/x4/epoch_11.pth" train_sr.py \
    --train-file $images/train.txt --eval-file $images/val.txt --outputs-dir $out/sr \
    --num-features 16 --growth-rate 16 --num-blocks 3 --num-layers 3 --vgg-lambda 0 \
    --start interpolation --schedule cosine --clip-norm 0.5 --lr 2e-3 \
    --patch-size 16 --batch-size 2 --patches-per-image 2 --num-epochs 12 --num-save 12

# Step 2: detectors on the residuals of "nearest" fakes, RDN frozen; stage 5 only on real features
names=(pixel)
if [[ -n "${VGG_WEIGHTS:-}" || -f "${TORCH_HOME:-$HOME/.cache/torch}/hub/checkpoints/vgg19-dcbb9e9d.pth" ]]; then
    names+=(stage5)
else
    say "no ImageNet weights for VGG-19 here: stage 5 is left out. VGG_WEIGHTS=FILE bash script/quickstart.sh adds it" \
        "(FILE: torchvision's vgg19 state dict)"
fi
detector() {
    local name=$1 epochs=$2
    shift 2
    trained "$out/$name/$(printf %04d "$epochs").pth.tar" train_detector.py \
        --fixed-sr --sr-weights-file $out/sr/x4/best.pth --arch resnet18 --no_dilation --epochs "$epochs" \
        --save-every-epoch "$epochs" --data-root-pos $images/train/real --data-root-neg $images/train/nearest \
        --val-root-pos $images/val/real --val-root-neg $images/val/nearest --output-path "$out/$name" "$@"
}
for name in "${names[@]}"; do
    case $name in
        pixel) detector pixel 24 --idx-stages 0 --lr 5e-3 --lr-sr 1 --batch-size 16 ;;
        stage5) detector stage5 24 --idx-stages 5 --schedule cosine --lr 0.05 --lr-sr 1 --batch-size 32 ;;
    esac
done

# Step 3: scores of held-out images, then everything that is made of scores
for name in "${names[@]}"; do
    say "test.py on held-out images: the $name detector"
    "$PYTHON" test.py --gpu "$gpu" --resume "$out/$name/last.pth.tar" --save_path "$out/scores/$name" \
        --data-root-pos $images/test/real --data-root-neg $images/test/nearest $images/test/bilinear >/dev/null
done
"$PYTHON" test.py --gpu "$gpu" --resume $out/pixel/last.pth.tar --save_path $out/scores/some \
    --input $images/test/{real,nearest,bilinear}/0000[01].png --save-residuals $out/residuals

echo
echo "Trained on nearest fakes, tested on held-out images (small networks, minutes of training):"
tables=("${names[@]/#/$out/scores/}")
"$PYTHON" -m utils.report "${tables[@]/%/.csv}" --out $out/report
echo "figures: $(ls -d "${tables[@]/%/.png}" $out/residuals $out/report/report.html | tr '\n' ' ')"
echo "TensorBoard: $PYTHON -m tensorboard.main --logdir $out"
say "done in $((SECONDS - began)) s"
