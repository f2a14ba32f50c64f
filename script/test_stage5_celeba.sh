#!/usr/bin/env bash
# Test the stage-5 detector that was trained on StyleGAN, on ProGAN images.
#   bash script/test_stage5_celeba.sh GPU_ID [any flag of test.py]
# Reads ./data/CelebA and ./data/CelebA_ProGAN (or DATA_ROOT_POS, DATA_ROOT_NEG; otherwise example images) and the detector
# (stylegan_celeba_stage5_noising/{cls,sr}.pth.tar under ./pretrained_models; RESUME, SR_RESUME;
# or what train_stage5_stylegan_denoising.sh or train_stage5_stylegan.sh wrote).
# Writes ./output/train_stylegan_stage5_noising_test_pggan.{csv,npy,json,png} (or OUTPUT_PATH.*).
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
