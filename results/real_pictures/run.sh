#!/usr/bin/env bash
# Does re-synthesis help on real pictures? Hours on two CPU cores.
#   VGG_WEIGHTS=FILE bash results/real_pictures/run.sh PICTURES
#
# PICTURES holds train/real, train/GENERATOR ..., val/real, val/GENERATOR ... (256 x 256 pixels or larger).
#   1. Train a small RDN on the real training pictures.
#   2. Train detectors on the pixel, stage-4 and stage-5 residuals, and three controls: two without re-synthesis
#      (--sr-arch none), and one with bicubic interpolation instead of RDN. Each detector is trained once on all
#      generators together and once on each generator alone.
#   3. Score the validation pictures of every generator with each detector.
#   4. Score them again after JPEG, noise, blur and resizing, with the detectors trained on all generators.
#
# Environment: INPUTS (default: pixel control bicubic stage4 stage5 control_stage5), EVAL (images for PSNR), GPU (default: cpu).
# Writes ./output/real_pictures. To refresh the tables, copy output/real_pictures/scores/*.csv to results/real_pictures/scores.
source "$(dirname "$0")/../../script/common.sh"
pictures=${1:?usage: bash results/real_pictures/run.sh PICTURES}
find_python
gpu=${GPU:-cpu}
out=$root/output/real_pictures
rdn=$out/sr/x4/last.pth
mkdir -p "$out"
generators=()
for folder in "$pictures"/train/*/; do
    [[ "$(basename "$folder")" == real ]] || generators+=("$(basename "$folder")")
done

# score NAME FLAG ...: score whole validation pictures of all generators with the detector NAME.
score() {
    local name=$1
    shift
    "$PYTHON" "$root/test.py" --gpu "$gpu" --resume "$out/$name/last.pth.tar" --crop-size 0 \
        --data-root-pos "$pictures/val/real" --data-root-neg "${generators[@]/#/$pictures/val/}" \
        --save_path "$out/scores/$name" "$@" >/dev/null
}

# detector NAME EPOCHS "GENERATOR ..." FLAG ...: train a detector on these generators and score all generators.
detector() {
    local name=$1 epochs=$2 seen=$3 fakes=() generator
    shift 3
    for generator in $seen; do
        fakes+=("$pictures/train/$generator")
    done
    train_once "$out/$name/$(printf %04d "$epochs").pth.tar" train_detector.py --fixed-sr \
        --arch resnet18 --no_dilation --schedule cosine --lr-sr 1 \
        --epochs "$epochs" --save-every-epoch "$epochs" --cache-dir "$out" \
        --data-root-pos "$pictures/train/real" --data-root-neg "${fakes[@]}" \
        --val-root-pos "$pictures/val/real" --val-root-neg "${generators[@]/#/$pictures/val/}" \
        --output-path "$out/$name" "$@"
    score "$name"
}

# 1. The re-synthesizer
train_once "$out/sr/x4/epoch_14.pth" train_sr.py --train-file "$pictures/train/real" --outputs-dir "$out/sr" \
    --num-features 16 --growth-rate 16 --num-blocks 4 --num-layers 4 --vgg-lambda 0 --start interpolation \
    --schedule cosine --clip-norm 0.5 --lr 2e-3 --batch-size 4 --num-epochs 15 --num-save 15 ${EVAL:+--eval-file "$EVAL"}

# 2 and 3. Detectors. A residual and its control are trained alike: pixels with AdamW on crops, stages 4 and 5 with SGD.
pixels=(--idx-stages 0 --optimizer adamw --lr 1e-3 --wd 0.05 --batch-size 16 --crop-size 128 --crops-per-image 2)
stages=(--lr 0.01 --batch-size 32)
inputs=${INPUTS:-pixel control bicubic ${VGG_WEIGHTS:+stage4 stage5 control_stage5}}
for input in $inputs; do
    for seen in all "${generators[@]}"; do
        name=${input}_on_$seen
        [[ $seen != all ]] || seen=${generators[*]}
        case $input in
            pixel) detector "$name" 5 "$seen" --sr-weights-file "$rdn" "${pixels[@]}" ;;
            control) detector "$name" 5 "$seen" --sr-arch none "${pixels[@]}" ;;
            bicubic) detector "$name" 5 "$seen" --sr-arch bicubic "${pixels[@]}" ;;
            stage4) detector "$name" 10 "$seen" --sr-weights-file "$rdn" --idx-stages 4 "${stages[@]}" ;;
            stage5) detector "$name" 10 "$seen" --sr-weights-file "$rdn" --idx-stages 5 "${stages[@]}" ;;
            control_stage5) detector "$name" 10 "$seen" --sr-arch none --idx-stages 5 "${stages[@]}" ;;
            *) fail "INPUTS: expected pixel, control, bicubic, stage4, stage5 or control_stage5, got $input" ;;
        esac
    done
done

# Score the pixel detector on crops instead of whole pictures
for crops in 1 4 9; do
    score pixel_on_all --crop-size 128 --crops "$crops" --save_path "$out/scores/pixel_on_all_crops_$crops"
done

# 4. Robustness
for input in $inputs; do
    score "${input}_on_all" --perturb jpeg=90 jpeg=70 jpeg=50 noise=0.05 blur=1 resize=0.5
done
tool report "$out"/scores/*.csv --markdown
