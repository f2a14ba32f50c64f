#!/usr/bin/env bash
# Train the re-synthesizer: RDN (residual dense network), a 4x super-resolution network, on real images only.
#   bash script/train_super_resolution_celeba.sh GPU_ID [any flag of train_sr.py]
# Training images: DATA_ROOT_POS (a list or a folder), or the list ./data/celeba_example_train.txt, or the folder
#   ./data/CelebA, or example images
# Images for PSNR and SSIM: EVAL (a list or a folder), or ./data/celeba_example_val.txt with the list above, or
#   data/example/val.txt with example images, otherwise none
# Output: OUTPUT_PATH/x4 (default of OUTPUT_PATH: ./output_hr)
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
        EVAL=${EVAL:-}
        [[ -n "$EVAL" ]] ||
            say "PSNR and SSIM are not computed: to compute them, add --eval-file LIST_OR_FOLDER"
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
