#!/usr/bin/env bash
# Train the stage5-level detector on StyleGAN images, RDN frozen: what the denoising fine-tuning starts from.
#   bash script/train_stage5_stylegan.sh GPU_ID [any flag of train_detector.py]
# Needs: ./data/CelebA and ./data/CelebA_StyleGAN (or DATA_ROOT_POS, DATA_ROOT_NEG; else example images) and RDN
# (./pretrained_models/sr_vgg_epoch_last.pth, SR_RESUME, or what train_super_resolution_celeba.sh wrote).
# Writes ./output_end2end/stage5_stylegan (or OUTPUT_PATH). The release has no such script; the settings are those of
# train_pixel_pggan.sh.
source "$(dirname "$0")/common.sh"
usage "$@"
find_python

choose_images train bilinear ./data/CelebA ./data/CelebA_StyleGAN
choose_resynthesizer ./pretrained_models/sr_vgg_epoch_last.pth

run train_detector.py \
    --gpu "$1" --arch resnet50 --no_dilation --fixed-sr \
    --idx-stages 5 --input-channel 512 \
    --lr 1e-2 --lr-sr 0.02 --epochs 100 --batch-size 10 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --sr-scale 4 --sr-num-features 64 --sr-growth-rate 64 --sr-num-blocks 16 --sr-num-layers 8 \
    --sr-weights-file "$SR_RESUME" \
    --output-path "${OUTPUT_PATH:-./output_end2end/stage5_stylegan}" \
    "${@:2}"
