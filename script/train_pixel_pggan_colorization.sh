#!/usr/bin/env bash
# Fine-tune RDN and the pixel-level detector end to end, with colorization as auxiliary task.
#   bash script/train_pixel_pggan_colorization.sh GPU_ID [any flag of train_detector.py]
# Needs: ./data/CelebA and ./data/CelebA_ProGAN (or DATA_ROOT_POS, DATA_ROOT_NEG; else example images) and the detector
# to start from (./pretrained_models/pixel_pggan_celeba.pth.tar and its RDN; RESUME, SR_RESUME; or what
# train_pixel_pggan.sh wrote). Writes ./output_end2end/pixel_pggan_colorization (or OUTPUT_PATH).
# --micro-batch 1: one image at a time in RDN and VGG: less memory, the same update.
source "$(dirname "$0")/common.sh"
usage "$@"
find_python

choose_images train nearest ./data/CelebA ./data/CelebA_ProGAN
choose_detector ./pretrained_models/pixel_pggan_celeba.pth.tar ./pretrained_models/sr_vgg_epoch_last.pth \
    train_pixel_pggan.sh ./output_end2end/pixel_pggan

run train_detector.py \
    --gpu "$1" --arch resnet50 --no_dilation --mode-sr colorization \
    --idx-stages 0 --input-channel 3 \
    --lr 1e-6 --lr-sr 1e-3 --lw-sr 1 --epochs 100 --batch-size 6 --micro-batch 1 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --init "$RESUME" ${SR_RESUME:+--sr-weights-file "$SR_RESUME"} \
    --output-path "${OUTPUT_PATH:-./output_end2end/pixel_pggan_colorization}" \
    "${@:2}"
