#!/usr/bin/env bash
# Test the pixel detector that was trained on ProGAN, on StyleGAN images.
#   bash script/test_pixel_celeba.sh GPU_ID [any flag of test.py]
# Reads ./data/CelebA and ./data/CelebA_StyleGAN (or DATA_ROOT_POS, DATA_ROOT_NEG; otherwise example images) and the detector
# (pixel_pggan_celeba.pth.tar and sr_vgg_epoch_last.pth under ./pretrained_models; RESUME, SR_RESUME;
# or what train_pixel_pggan.sh wrote).
# Writes ./output/train_pggan_pixel_test_stylegan.{csv,npy,json,png} (or OUTPUT_PATH.*).
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
