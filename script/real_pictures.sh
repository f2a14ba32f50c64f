#!/usr/bin/env bash
# What re-synthesis is worth on real pictures, within hours on two CPU cores:
#   VGG_WEIGHTS=FILE bash script/real_pictures.sh PICTURES
# PICTURES holds train/real, train/GENERATOR ..., val/real, val/GENERATOR ... (256 x 256 or larger). Trains a small RDN on
# the reals; then, for each generator and for all together, a ResNet-18 on the plain pixels (an RDN of zeros: the residual
# is the picture), on the pixel residual, and with VGG_WEIGHTS on the stage-5 residual; tests each on every generator,
# seen and unseen. INPUTS (stage5 pixel plain) chooses. Writes output/real_pictures.
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

# detector NAME RDN GENERATORS FLAG ...: trained on those generators, tested on all
detector() {
    local name=$1 rdn=$2 seen=$3
    shift 3
    local fakes=() && for g in $seen; do fakes+=("$pictures/train/$g"); done
    trained "$out/$name/$(printf %04d "$EPOCHS").pth.tar" train_detector.py --fixed-sr --sr-weights-file "$rdn" \
        --arch resnet18 --no_dilation --schedule cosine --lr-sr 1 \
        --epochs "$EPOCHS" --save-every-epoch "$EPOCHS" --cache-dir "$out" --data-root-pos "$pictures/train/real" \
        --data-root-neg "${fakes[@]}" --val-root-pos "$pictures/val/real" --val-root-neg "${generators[@]/#/$pictures/val/}" \
        --output-path "$out/$name" "$@"
    "$PYTHON" test.py --gpu "$gpu" --resume "$out/$name/last.pth.tar" --save_path "$out/scores/$name" \
        --data-root-pos "$pictures/val/real" --data-root-neg "${generators[@]/#/$pictures/val/}" >/dev/null
}
# Stage 5 learns at a high rate of SGD; at that rate SGD failed on pixels, which learn with AdamW.
sgd="--lr 0.05 --batch-size 32" adamw="--optimizer adamw --lr 1e-3 --wd 0.05 --batch-size 16 --crop-size 128 --crops-per-image 2"
for input in ${INPUTS:-${VGG_WEIGHTS:+stage5} pixel plain}; do
    for seen in "${generators[*]}" "${generators[@]}"; do
        name=${input}_on_${seen// /+}
        case $input in
            stage5) EPOCHS=16 detector "$name" "$out/sr/x4/last.pth" "$seen" --idx-stages 5 $sgd ;;
            pixel) EPOCHS=12 detector "$name" "$out/sr/x4/last.pth" "$seen" $adamw ;;
            plain) EPOCHS=12 detector "$name" "$out/zeros.pth" "$seen" $adamw ;;
        esac
    done
done
"$PYTHON" -m utils.report "$out"/scores/*_on_*.csv --markdown
