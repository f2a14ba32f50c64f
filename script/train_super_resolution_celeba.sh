#!/usr/bin/env bash
# Train the re-synthesizer: RDN, 4x super-resolution, on real images only.
#   bash script/train_super_resolution_celeba.sh GPU_ID [any flag of train_sr.py]
# Needs: data/celeba_example_train.txt and data/celeba_example_val.txt (lists of images), or DATA_ROOT_POS (a folder);
# without either, example images are made. Writes ./output_hr/x4 (or OUTPUT_PATH/x4).
source "$(dirname "$0")/common.sh"
usage "$@"
find_python

if [[ -z "${DATA_ROOT_POS:-}" && ! -e data/celeba_example_train.txt && ! -e data/CelebA ]]; then
    example
fi
choose DATA_ROOT_POS "real images to train on" data/celeba_example_train.txt data/CelebA data/example/train.txt
case "$DATA_ROOT_POS" in
    data/celeba_example_train.txt) choose EVAL "images to evaluate on" data/celeba_example_val.txt ;;
    data/example/train.txt) choose EVAL "images to evaluate on" data/example/val.txt ;;
    *) EVAL="" && say "no images to evaluate on: --eval-file LIST_OR_FOLDER adds PSNR and SSIM" ;;
esac

run train_sr.py \
    --gpu-id "$1" \
    --train-file "$DATA_ROOT_POS" ${EVAL:+--eval-file "$EVAL"} \
    --outputs-dir "${OUTPUT_PATH:-./output_hr}" \
    --scale 4 --num-features 64 --growth-rate 64 --num-blocks 16 --num-layers 8 \
    --lr 1e-4 --lr-decay 0.5 --lr-decay-epoch 225 \
    --batch-size 12 --patch-size 24 --num-epochs 750 --num-save 15 --num-workers 8 \
    "${@:2}"
