#!/usr/bin/env bash
# Fine-tune RDN and the pixel detector end to end, with colorization as the auxiliary task.
#   bash script/train_pixel_pggan_colorization.sh GPU_ID [any flag of train_detector.py]
# Images: DATA_ROOT_POS and DATA_ROOT_NEG, or ./data/CelebA and ./data/CelebA_ProGAN, or example images
# Detector to fine-tune: RESUME and SR_RESUME, or pixel_pggan_celeba.pth.tar and sr_vgg_epoch_last.pth in
#   ./pretrained_models, or the output of train_pixel_pggan.sh
# Output: OUTPUT_PATH (default: ./output_end2end/pixel_pggan_colorization)
# --micro-batch 1 passes one image at a time through RDN and VGG-19. This needs less memory and gives the same update.
source "$(dirname "$0")/common.sh"
check_gpu_argument "$@"
find_python

choose_images train nearest CelebA CelebA_ProGAN
choose_detector "$root/pretrained_models/pixel_pggan_celeba.pth.tar" "$root/pretrained_models/sr_vgg_epoch_last.pth" \
    train_pixel_pggan.sh "$root/output_end2end/pixel_pggan"

run train_detector.py \
    --gpu "$1" --arch resnet50 --no_dilation --mode-sr colorization \
    --idx-stages 0 --input-channel 3 \
    --lr 1e-6 --lr-sr 1e-3 --lw-sr 1 --epochs 100 --batch-size 6 --micro-batch 1 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --init "$RESUME" ${SR_RESUME:+--sr-weights-file "$SR_RESUME"} \
    --output-path "${OUTPUT_PATH:-$root/output_end2end/pixel_pggan_colorization}" \
    "${@:2}"
