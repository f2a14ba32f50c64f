#!/usr/bin/env bash
# Does re-synthesis help on faces? Hours on two CPU cores.
#   VGG_WEIGHTS=FILE AUTOENCODER="ENCODER DECODER" bash results/faces/run.sh FACES
#
# FACES holds train/real, train/stylegan2, val/real and val/stylegan2 (256 x 256 pixels).
#   1. Train a small RDN on the real training faces.
#   2. Make twins: the real faces, passed through a small autoencoder.
#   3. Train detectors with RDN, bicubic interpolation and no re-synthesis: on the signed pixel residual (spectrum
#      classifier), and on the stage-4 and stage-5 residuals (channel-power classifier). Three seeds each.
#      For comparison: no twins ("single"), twins alone ("twins"), up-sampled copies instead of twins ("upsampled") or
#      together with twins ("copies"), the absolute residual ("absolute"), smaller windows ("window16"), a ResNet-18 on
#      the absolute ("resnet") and on the signed residual ("resnet_signed").
#   4. Score the validation faces with each detector: StyleGAN2, twins and up-sampled copies, clean and perturbed.
#   5. Fine-tune the pixel detectors with RDN, with half of the images perturbed ("fine_tuning"). "frozen" keeps RDN
#      fixed. "no_task", "colorization" and "denoising" train RDN, too, without and with an auxiliary task.
#
# Environment: CELLS (default: all), NETWORKS (default: rdn bicubic none), SEEDS (default: 1 2 3), PERTURB_SEEDS (seeds of
# steps 3 and 4 that are scored on perturbed faces, too; default: 1), GPU (default: cpu).
# Writes ./output/faces. To refresh the tables, copy output/faces/scores/*.csv to results/faces/scores.
source "$(dirname "$0")/../../script/common.sh"
source "$root/results/copies.sh"
faces=${1:?usage: bash results/faces/run.sh FACES}
find_python
gpu=${GPU:-cpu}
out=$root/output/faces
rdn=$out/sr/x4/last.pth
twins=$out/twins
generator=$faces/train/stylegan2
both=$generator$'\n'$twins/train # folders are separated by line breaks
mkdir -p "$out"

# 1. The re-synthesizer: about 2,600 steps of 4 patches
train_once "$out/sr/x4/epoch_185.pth" train_sr.py --train-file "$faces/train/real" --outputs-dir "$out/sr" \
    --num-features 16 --growth-rate 16 --num-blocks 4 --num-layers 4 --vgg-lambda 0 --start interpolation \
    --schedule cosine --clip-norm 0.5 --lr 2e-3 --batch-size 4 --num-epochs 186 --num-save 186
"$PYTHON" "$root/train_sr.py" --gpu "$gpu" --evaluate --weights-file "$rdn" --eval-file "$faces/val/real"

# 2. Twins and up-sampled copies
make_copies "$faces" "$out"

# score NAME FLAG ...: score whole validation faces. Twins and up-sampled copies count as generators.
score() {
    local name=$1
    shift
    "$PYTHON" "$root/test.py" --gpu "$gpu" --resume "$out/$name/last.pth.tar" --crop-size 0 \
        --data-root-pos "$faces/val/real" --data-root-neg "$faces/val/stylegan2" "$twins/val" "$out/upsampled/val" \
        --save_path "$out/scores/$name" "$@" >/dev/null
}

# detector NAME EPOCHS SEED FOLDERS FLAG ...: train a detector on the generated faces in these folders, and score it.
detector() {
    local name=$1 epochs=$2 seed=$3 fakes
    mapfile -t fakes <<<"$4"
    shift 4
    train_once "$out/$name/$(printf %04d "$epochs").pth.tar" train_detector.py --fixed-sr --seed "$seed" \
        --optimizer adamw --lr 2e-3 --wd 0.05 --lr-sr 1 --schedule cosine --batch-size 64 \
        --epochs "$epochs" --save-every-epoch "$epochs" --cache-dir "$out/cache" \
        --data-root-pos "$faces/train/real" --data-root-neg "${fakes[@]}" \
        --val-root-pos "$faces/val/real" --val-root-neg "$faces/val/stylegan2" --output-path "$out/$name" "$@"
    [[ -f "$out/scores/$name.csv" ]] || score "$name"
    if [[ " ${PERTURB_SEEDS:-1} " == *" $seed "* ]]; then
        score "$name" --perturb jpeg=90 jpeg=70 jpeg=50 resize=0.5 blur=1 noise=0.05
    fi
}

# fine_tune NAME SEED FLAG ...: fine-tune the pixel detector with RDN for one epoch of 28 steps, and score it.
fine_tune() {
    local name=$1_seed$2 seed=$2
    shift 2
    train_once "$out/$name/0001.pth.tar" train_detector.py --seed "$seed" --init "$out/pixel_rdn_seed$seed/last.pth.tar" \
        --optimizer adamw --wd 0.05 --schedule cosine --batch-size 16 --crop-size 128 --crops-per-image 2 \
        --augment-perturb --epochs 1 --save-every-epoch 1 \
        --data-root-pos "$faces/train/real" --data-root-neg "$generator" "$twins/train" --output-path "$out/$name" "$@"
    score "$name" --perturb none jpeg=70 blur=1 noise=0.05
}

# 5. The classifier learns at lr * lr-sr = 5e-4 in each of these. RDN learns at lr = 1e-4 where it is trained.
fine_tuning() {
    local seed=$1
    fine_tune frozen "$seed" --fixed-sr --lr 5e-4 --lr-sr 1
    fine_tune no_task "$seed" --mode-sr none --lw-sr 0 --lr 1e-4 --lr-sr 5
    fine_tune colorization "$seed" --mode-sr colorization --lr 1e-4 --lr-sr 5
    fine_tune denoising "$seed" --mode-sr denoising --lr 1e-4 --lr-sr 5
}

# 3 and 4. About 400 steps each. The seed fixes crops, order and initial weights.
pixels=(--residual signed --arch spectrum --crop-size 128 --crops-per-image 4)
resnet=(--arch resnet18 --no_dilation --lr 1e-3 --batch-size 16 --crop-size 128 --crops-per-image 2)
stage4=(--idx-stages 4 --arch channel_power)
stage5=(--idx-stages 5 --arch channel_power)
all_cells="pixel stage4 stage5 single twins upsampled copies absolute window16 resnet resnet_signed fine_tuning"
for seed in ${SEEDS:-1 2 3}; do
    for cell in ${CELLS:-$all_cells}; do
        for network in ${NETWORKS:-rdn bicubic none}; do
            resynthesis=(--sr-arch "$network")
            [[ "$network" != rdn ]] || resynthesis=(--sr-weights-file "$rdn")
            name=${cell}_${network}_seed$seed
            case $cell in
                pixel) detector "$name" 28 "$seed" "$both" "${resynthesis[@]}" "${pixels[@]}" ;;
                stage4) detector "$name" 100 "$seed" "$both" "${resynthesis[@]}" "${stage4[@]}" ;;
                stage5) detector "$name" 100 "$seed" "$both" "${resynthesis[@]}" "${stage5[@]}" ;;
                single) detector "$name" 37 "$seed" "$generator" "${resynthesis[@]}" "${pixels[@]}" ;;
                twins) detector "$name" 56 "$seed" "$twins/train" "${resynthesis[@]}" "${pixels[@]}" ;;
                upsampled)
                    detector "$name" 28 "$seed" "$generator"$'\n'"$out/upsampled/train" "${resynthesis[@]}" "${pixels[@]}"
                    ;;
                absolute) detector "$name" 28 "$seed" "$both" "${resynthesis[@]}" "${pixels[@]}" --residual absolute ;;
                copies) detector "$name" 23 "$seed" "$both"$'\n'"$out/upsampled/train" "${resynthesis[@]}" "${pixels[@]}" ;;
                window16) detector "$name" 28 "$seed" "$both" "${resynthesis[@]}" "${pixels[@]}" --arch-args window=16 ;;
                resnet) detector "$name" 14 "$seed" "$both" "${resynthesis[@]}" "${resnet[@]}" ;;
                resnet_signed)
                    detector "$name" 14 "$seed" "$both" "${resynthesis[@]}" "${resnet[@]}" --residual signed
                    ;;
                fine_tuning)
                    if [[ "$network" == rdn ]]; then
                        fine_tuning "$seed"
                    fi
                    ;;
                *) fail "CELLS: expected some of $all_cells, got $cell" ;;
            esac
        done
    done
done
