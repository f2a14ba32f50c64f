#!/usr/bin/env bash
# Train a detector on the pixel residuals of real and ProGAN images. The re-synthesizer stays frozen.
#   bash script/train_pixel_pggan.sh GPU_ID [any flag of train_detector.py]
# Images: DATA_ROOT_POS and DATA_ROOT_NEG, or ./data/CelebA and ./data/CelebA_ProGAN, or example images
# Re-synthesizer: SR_RESUME, or ./pretrained_models/sr_vgg_epoch_last.pth, or the output of
#   train_super_resolution_celeba.sh
# Output: OUTPUT_PATH (default: ./output_end2end/pixel_pggan)
source "$(dirname "$0")/common.sh"
check_gpu_argument "$@"
find_python

choose_images train nearest CelebA CelebA_ProGAN
choose_resynthesizer "$root/pretrained_models/sr_vgg_epoch_last.pth"

run train_detector.py \
    --gpu "$1" --arch resnet50 --no_dilation --fixed-sr \
    --idx-stages 0 --input-channel 3 \
    --lr 1e-2 --lr-sr 0.02 --epochs 100 --batch-size 10 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --sr-scale 4 --sr-num-features 64 --sr-growth-rate 64 --sr-num-blocks 16 --sr-num-layers 8 \
    --sr-weights-file "$SR_RESUME" \
    --output-path "${OUTPUT_PATH:-$root/output_end2end/pixel_pggan}" \
    "${@:2}"
