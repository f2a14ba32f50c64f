#!/usr/bin/env bash
# Test a stage-5 detector on ProGAN images. The detector was trained on StyleGAN images.
#   bash script/test_stage5_celeba.sh GPU_ID [any flag of test.py]
# Images: DATA_ROOT_POS and DATA_ROOT_NEG, or ./data/CelebA and ./data/CelebA_ProGAN, or example images
# Detector: RESUME and SR_RESUME, or stylegan_celeba_stage5_noising/{cls,sr}.pth.tar in ./pretrained_models, or the output
#   of train_stage5_stylegan_denoising.sh, or the output of train_stage5_stylegan.sh
# Output: OUTPUT_PATH.{csv,npy,json,png} (default of OUTPUT_PATH: ./output/train_stylegan_stage5_noising_test_pggan)
source "$(dirname "$0")/common.sh"
check_gpu_argument "$@"
find_python

choose_images test nearest CelebA CelebA_ProGAN
released=$root/pretrained_models/stylegan_celeba_stage5_noising
choose_detector "$released/cls.pth.tar" "$released/sr.pth.tar" train_stage5_stylegan.sh \
    "$root/output_end2end/stage5_stylegan_noising" "$root/output_end2end/stage5_stylegan"

run test.py \
    --gpu "$1" --arch resnet50 --no_dilation \
    --idx-stages 5 --input-channel 512 --batch-size 1 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --resume "$RESUME" ${SR_RESUME:+--sr-weights-file "$SR_RESUME"} \
    --save_path "${OUTPUT_PATH:-$root/output/train_stylegan_stage5_noising_test_pggan}" \
    "${@:2}"
