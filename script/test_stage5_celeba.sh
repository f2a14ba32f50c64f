#!/usr/bin/env bash
# Test the stage5-level detector trained on StyleGAN on ProGAN images.
#   bash script/test_stage5_celeba.sh GPU_ID [any flag of test.py]
# Needs: ./data/CelebA and ./data/CelebA_ProGAN (or DATA_ROOT_POS, DATA_ROOT_NEG; else example images) and the detector
# (./pretrained_models/stylegan_celeba_stage5_noising/{cls,sr}.pth.tar; RESUME, SR_RESUME; or what
# train_stage5_stylegan_denoising.sh or train_stage5_stylegan.sh wrote).
# Writes ./output/train_stylegan_stage5_noising_test_pggan.{csv,npy,json,png} (or OUTPUT_PATH.*).
source "$(dirname "$0")/common.sh"
usage "$@"
find_python

choose_images test nearest ./data/CelebA ./data/CelebA_ProGAN
choose_detector ./pretrained_models/stylegan_celeba_stage5_noising/cls.pth.tar \
    ./pretrained_models/stylegan_celeba_stage5_noising/sr.pth.tar train_stage5_stylegan.sh \
    ./output_end2end/stage5_stylegan_noising ./output_end2end/stage5_stylegan

run test.py \
    --gpu "$1" --arch resnet50 --no_dilation \
    --idx-stages 5 --input-channel 512 --batch-size 1 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --resume "$RESUME" ${SR_RESUME:+--sr-weights-file "$SR_RESUME"} \
    --save_path "${OUTPUT_PATH:-./output/train_stylegan_stage5_noising_test_pggan}" \
    "${@:2}"
