#!/usr/bin/env bash
# What re-synthesis is worth on real pictures, within hours on two CPU cores:
#   VGG_WEIGHTS=FILE bash script/real_pictures.sh PICTURES
# PICTURES holds train/real, train/GENERATOR ..., val/real, val/GENERATOR ... (256 x 256 or larger). Trains a small RDN on
# the reals; then, for all generators together and for each, a ResNet-18 on the residual of pixels, stage 4 and stage 5,
# and on pixels and stage 5 without re-synthesis (plain, plain_stage5: an RDN of zeros, so that the residual is the picture
# or its features); tests each on every generator, seen and unseen, and those trained on all under perturbations, too.
# INPUTS (pixel plain stage4 stage5 plain_stage5) chooses. Writes output/real_pictures; docs/results.md has the tables.
source "$(dirname "$0")/common.sh"
pictures=${1:?usage: bash script/real_pictures.sh PICTURES}
find_python
gpu=${GPU:-cpu} out=output/real_pictures
mkdir -p "$out"
generators=()
for folder in "$pictures"/train/*/; do
    [[ "$(basename "$folder")" == real ]] || generators+=("$(basename "$folder")")
done

trained "$out/sr/x4/epoch_14.pth" train_sr.py --train-file "$pictures/train/real" --outputs-dir "$out/sr" \
    --num-features 16 --growth-rate 16 --num-blocks 4 --num-layers 4 --vgg-lambda 0 --start interpolation \
    --schedule cosine --clip-norm 0.5 --lr 2e-3 --batch-size 4 --num-epochs 15 --num-save 15 ${EVAL:+--eval-file "$EVAL"}
[[ -f $out/zeros.pth ]] || "$PYTHON" -c "import torch, models; rdn = models.RDN(4, 8, 8, 1, 1)
torch.save({k: v * 0 for k, v in rdn.state_dict().items()}, '$out/zeros.pth')"

# scored NAME FLAG ...: whole pictures of the validation part
scored() {
    "$PYTHON" test.py --gpu "$gpu" --resume "$out/$1/last.pth.tar" --crop-size 0 --save_path "$out/scores/$1" \
        --data-root-pos "$pictures/val/real" --data-root-neg "${generators[@]/#/$pictures/val/}" "${@:2}" >/dev/null
}

# detector NAME RDN EPOCHS GENERATORS FLAG ...: trained on those generators, tested on all
detector() {
    local name=$1 rdn=$2 epochs=$3 seen=$4 fakes=()
    shift 4
    for g in $seen; do fakes+=("$pictures/train/$g"); done
    trained "$out/$name/$(printf %04d "$epochs").pth.tar" train_detector.py --fixed-sr --sr-weights-file "$rdn" \
        --arch resnet18 --no_dilation --schedule cosine --lr-sr 1 \
        --epochs "$epochs" --save-every-epoch "$epochs" --cache-dir "$out" --data-root-pos "$pictures/train/real" \
        --data-root-neg "${fakes[@]}" --val-root-pos "$pictures/val/real" --val-root-neg "${generators[@]/#/$pictures/val/}" \
        --output-path "$out/$name" "$@"
    scored "$name"
}
# Stages 4 and 5 learn with SGD at 0.01 (at 0.05 and 0.001 validation jumps), pixels with AdamW. What is compared with
# each other learns alike.
features="--lr 0.01 --batch-size 32"
pixel="--optimizer adamw --lr 1e-3 --wd 0.05 --batch-size 16 --crop-size 128 --crops-per-image 2"
inputs=${INPUTS:-pixel plain ${VGG_WEIGHTS:+stage4 stage5 plain_stage5}}
for input in $inputs; do
    for seen in "${generators[*]}" "${generators[@]}"; do
        name=${input}_on_${seen// /+}
        case $input in
            stage[45]) detector "$name" "$out/sr/x4/last.pth" 10 "$seen" --idx-stages "${input#stage}" $features ;;
            plain_stage5) detector "$name" "$out/zeros.pth" 10 "$seen" --idx-stages 5 $features ;;
            pixel) detector "$name" "$out/sr/x4/last.pth" 5 "$seen" $pixel ;;
            plain) detector "$name" "$out/zeros.pth" 5 "$seen" $pixel ;;
        esac
    done
done
for input in $inputs; do
    all=${generators[*]}
    scored "${input}_on_${all// /+}" --perturb jpeg=90 jpeg=70 jpeg=50 noise=0.05 blur=1 resize=0.5
done
"$PYTHON" -m tools.report "$out"/scores/*_on_*.csv --markdown
