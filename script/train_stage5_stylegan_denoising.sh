#!/usr/bin/env bash
# Fine-tune RDN and the stage5-level detector end to end, with denoising as auxiliary task.
#   bash script/train_stage5_stylegan_denoising.sh GPU_ID [any flag of train_detector.py]
# Needs: ./data/CelebA and ./data/CelebA_StyleGAN (or DATA_ROOT_POS, DATA_ROOT_NEG; else example images) and the
# detector to start from (./pretrained_models/stylegan_celeba_stage5_noising/{cls,sr}.pth.tar; RESUME, SR_RESUME; or what
# train_stage5_stylegan.sh wrote). Writes ./output_end2end/stage5_stylegan_noising (or OUTPUT_PATH).
# --micro-batch 1: one image at a time in RDN and VGG: less memory, the same update.
source "$(dirname "$0")/common.sh"
usage "$@"
find_python

choose_images train bilinear ./data/CelebA ./data/CelebA_StyleGAN
choose_detector ./pretrained_models/stylegan_celeba_stage5_noising/cls.pth.tar \
    ./pretrained_models/stylegan_celeba_stage5_noising/sr.pth.tar train_stage5_stylegan.sh ./output_end2end/stage5_stylegan

run train_detector.py \
    --gpu "$1" --arch resnet50 --no_dilation --mode-sr denoising \
    --idx-stages 5 --input-channel 512 \
    --lr 1e-6 --lr-sr 1e-3 --lw-sr 1 --epochs 100 --batch-size 6 --micro-batch 1 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --init "$RESUME" ${SR_RESUME:+--sr-weights-file "$SR_RESUME"} \
    --output-path "${OUTPUT_PATH:-./output_end2end/stage5_stylegan_noising}" \
    "${@:2}"
