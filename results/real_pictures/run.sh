#!/usr/bin/env bash
# Does re-synthesis help on real pictures? Hours on two CPU cores.
#   VGG_WEIGHTS=FILE AUTOENCODER="ENCODER DECODER" FACES=DIR bash results/real_pictures/run.sh PICTURES
#
# PICTURES holds train/real, train/GENERATOR ..., val/real, val/GENERATOR ... (256 x 256 pixels or larger).
#   1. Train a small RDN on the real training pictures.
#   2. Make twins: the real pictures, passed through a small autoencoder. Make up-sampled copies of them, too.
#   3. Train detectors on the pixel, stage-4 and stage-5 residuals. Each residual has two controls: bicubic interpolation
#      instead of RDN (--sr-arch bicubic), and no re-synthesis (--sr-arch none). Each detector is trained once on all
#      generators together and once on each generator alone. ("spectrum" is the classifier of results/faces. It is also
#      trained on twins alone, and on one generator together with twins or with up-sampled copies.)
#   4. Score the validation pictures of every generator and their twins with each detector.
#   5. Score them again after JPEG, noise, blur and resizing, with the detectors trained on all generators.
#
# Environment: INPUTS (default: all), EVAL (images for PSNR), GPU (default: cpu), SEEN (training sets; default: "all" and
# each generator), SEEDS (default: 123), FACES (the images of results/faces; pixel and spectrum detectors are tested on them,
# too).
# Writes ./output/real_pictures. To refresh the tables, copy output/real_pictures/scores/*.csv to results/real_pictures/scores.
source "$(dirname "$0")/../../script/common.sh"
source "$root/results/copies.sh"
pictures=${1:?usage: bash results/real_pictures/run.sh PICTURES}
find_python
gpu=${GPU:-cpu}
out=$root/output/real_pictures
rdn=$out/sr/x4/last.pth
twins=$out/twins
mkdir -p "$out"
generators=()
for folder in "$pictures"/train/*/; do
    [[ "$(basename "$folder")" == real ]] || generators+=("$(basename "$folder")")
done

# score NAME FLAG ...: score whole validation pictures with the detector NAME. Twins count as a generator.
score() {
    local name=$1
    shift
    "$PYTHON" "$root/test.py" --gpu "$gpu" --resume "$out/$name/last.pth.tar" --crop-size 0 \
        --data-root-pos "$pictures/val/real" --data-root-neg "${generators[@]/#/$pictures/val/}" "$twins/val" \
        --save_path "$out/scores/$name" "$@" >/dev/null
}

# detector NAME EPOCHS "GENERATOR ..." FLAG ...: train a detector on these generators (or on twins), and score it.
detector() {
    local name=$1 epochs=$2 seen=$3 fakes=() generator
    shift 3
    for generator in $seen; do
        if [[ "$generator" == twins || "$generator" == upsampled ]]; then
            fakes+=("$out/$generator/train")
        else
            fakes+=("$pictures/train/$generator")
        fi
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

# 2. Twins and up-sampled copies
make_copies "$pictures" "$out"

# 3 and 4. Detectors. A residual and its controls are trained alike: pixels with AdamW on crops, stages 4 and 5 with SGD.
pixels=(--idx-stages 0 --optimizer adamw --lr 1e-3 --wd 0.05 --batch-size 16 --crop-size 128 --crops-per-image 2)
spectrum=(--residual signed --arch spectrum --optimizer adamw --lr 2e-3 --wd 0.05 --batch-size 64
    --crop-size 128 --crops-per-image 4)
stage4=(--idx-stages 4 --lr 0.01 --batch-size 32)
stage5=(--idx-stages 5 --lr 0.01 --batch-size 32)
inputs=${INPUTS:-pixel bicubic control spectrum spectrum_bicubic spectrum_control
    ${VGG_WEIGHTS:+stage4 bicubic_stage4 control_stage4 stage5 bicubic_stage5 control_stage5}}
for input in $inputs; do
    case $input in
        *control*) network=(--sr-arch none) ;;
        *bicubic*) network=(--sr-arch bicubic) ;;
        *) network=(--sr-weights-file "$rdn") ;;
    esac
    case $input in
        pixel | bicubic | control) epochs=5 recipe=("${pixels[@]}") ;;
        spectrum | spectrum_bicubic | spectrum_control) epochs=8 recipe=("${spectrum[@]}") ;;
        stage4 | bicubic_stage4 | control_stage4) epochs=10 recipe=("${stage4[@]}") ;;
        stage5 | bicubic_stage5 | control_stage5) epochs=10 recipe=("${stage5[@]}") ;;
        *) fail "INPUTS: unknown input $input" ;;
    esac
    training_sets=${SEEN:-all ${generators[*]}}
    if [[ "$input" == spectrum* ]]; then
        training_sets+=" twins ${generators[*]/%/+twins} ${generators[*]/%/+upsampled} ${generators[*]/%/+twins+upsampled}"
    fi
    for training_set in $training_sets; do
        seen=${training_set//+/ }
        [[ "$training_set" != all ]] || seen=${generators[*]}
        for seed in ${SEEDS:-123}; do
            name=${input}_on_${training_set//+/_and_}
            faces_name=${name}_faces
            if [[ "$seed" != 123 ]]; then # 123 is the default seed of train_detector.py
                name+=_seed$seed
                faces_name+=_seed$seed
            fi
            detector "$name" "$epochs" "$seen" --seed "$seed" "${network[@]}" "${recipe[@]}"
            if [[ "$input" =~ ^(spectrum|pixel) && -n "${FACES:-}" && ! -f "$out/scores/$faces_name.csv" ]]; then
                score "$name" --data-root-pos "$FACES/val/real" --data-root-neg "$FACES/val/stylegan2" \
                    --save_path "$out/scores/$faces_name"
            fi
        done
    done
done

# 5. Robustness of the detectors that were trained on all generators, and the pixel detector on crops
for input in $inputs; do
    if [[ -f "$out/${input}_on_all/last.pth.tar" ]]; then
        score "${input}_on_all" --perturb jpeg=90 jpeg=70 jpeg=50 noise=0.05 blur=1 resize=0.5
        if [[ "$input" == pixel ]]; then
            for crops in 1 4 9; do
                score pixel_on_all --crop-size 128 --crops "$crops" --save_path "$out/scores/pixel_on_all_crops_$crops"
            done
        fi
    fi
done
tool report "$out"/scores/*.csv --markdown
