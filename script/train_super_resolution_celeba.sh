#!/usr/bin/env bash
# Train the re-synthesizer: RDN (residual dense network), a 4x super-resolution network, on real images only.
#   bash script/train_super_resolution_celeba.sh GPU_ID [any flag of train_sr.py]
# Reads data/celeba_example_train.txt and data/celeba_example_val.txt (lists of images), or the folder data/CelebA, or
# DATA_ROOT_POS (a list or folder). Without any of these, example images are made.
# Writes ./output_hr/x4 (or OUTPUT_PATH/x4).
source "$(dirname "$0")/common.sh"
check_gpu_argument "$@"
find_python

train_list=$root/data/celeba_example_train.txt
if [[ -z "${DATA_ROOT_POS:-}" && ! -e "$train_list" && ! -e "$root/data/CelebA" ]]; then
    make_example_images
fi
choose DATA_ROOT_POS "real images to train on" "$train_list" "$root/data/CelebA" "$root/data/example/train.txt"
case "$DATA_ROOT_POS" in
    "$train_list") choose EVAL "images to evaluate on" "$root/data/celeba_example_val.txt" ;;
    "$root/data/example/train.txt") choose EVAL "images to evaluate on" "$root/data/example/val.txt" ;;
    *)
        EVAL=""
        say "no images to evaluate on: --eval-file LIST_OR_FOLDER adds PSNR and SSIM"
        ;;
esac

run train_sr.py \
    --gpu-id "$1" \
    --train-file "$DATA_ROOT_POS" ${EVAL:+--eval-file "$EVAL"} \
    --outputs-dir "${OUTPUT_PATH:-$root/output_hr}" \
    --scale 4 --num-features 64 --growth-rate 64 --num-blocks 16 --num-layers 8 \
    --lr 1e-4 --lr-decay 0.5 --lr-decay-epoch 225 \
    --batch-size 12 --patch-size 24 --num-epochs 750 --num-save 15 --num-workers 8 \
    "${@:2}"
