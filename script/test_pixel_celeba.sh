#!/usr/bin/env bash
# Test a pixel detector on StyleGAN images. The detector was trained on ProGAN images.
#   bash script/test_pixel_celeba.sh GPU_ID [any flag of test.py]
# Images: DATA_ROOT_POS and DATA_ROOT_NEG, or ./data/CelebA and ./data/CelebA_StyleGAN, or example images
# Detector: RESUME and SR_RESUME, or pixel_pggan_celeba.pth.tar and sr_vgg_epoch_last.pth in ./pretrained_models, or the
#   output of train_pixel_pggan.sh
# Output: OUTPUT_PATH.{csv,npy,json,png} (default of OUTPUT_PATH: ./output/train_pggan_pixel_test_stylegan)
source "$(dirname "$0")/common.sh"
check_gpu_argument "$@"
find_python

choose_images test bilinear CelebA CelebA_StyleGAN
choose_detector "$root/pretrained_models/pixel_pggan_celeba.pth.tar" "$root/pretrained_models/sr_vgg_epoch_last.pth" \
    train_pixel_pggan.sh "$root/output_end2end/pixel_pggan"

run test.py \
    --gpu "$1" --arch resnet50 --no_dilation \
    --idx-stages 0 --input-channel 3 --batch-size 1 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --resume "$RESUME" ${SR_RESUME:+--sr-weights-file "$SR_RESUME"} \
    --save_path "${OUTPUT_PATH:-$root/output/train_pggan_pixel_test_stylegan}" \
    "${@:2}"
