#!/usr/bin/env bash
# Fine-tune RDN and the stage-5 detector end to end, with denoising as the auxiliary task.
#   bash script/train_stage5_stylegan_denoising.sh GPU_ID [any flag of train_detector.py]
# Images: DATA_ROOT_POS and DATA_ROOT_NEG, or ./data/CelebA and ./data/CelebA_StyleGAN, or example images
# Detector to fine-tune: RESUME and SR_RESUME, or stylegan_celeba_stage5_noising/{cls,sr}.pth.tar in ./pretrained_models,
#   or the output of train_stage5_stylegan.sh
# Output: OUTPUT_PATH (default: ./output_end2end/stage5_stylegan_noising)
# --micro-batch 1 passes one image at a time through RDN and VGG-19. This needs less memory and gives the same update.
source "$(dirname "$0")/common.sh"
check_gpu_argument "$@"
find_python

choose_images train bilinear CelebA CelebA_StyleGAN
released=$root/pretrained_models/stylegan_celeba_stage5_noising
choose_detector "$released/cls.pth.tar" "$released/sr.pth.tar" train_stage5_stylegan.sh \
    "$root/output_end2end/stage5_stylegan"

run train_detector.py \
    --gpu "$1" --arch resnet50 --no_dilation --mode-sr denoising \
    --idx-stages 5 --input-channel 512 \
    --lr 1e-6 --lr-sr 1e-3 --lw-sr 1 --epochs 100 --batch-size 6 --micro-batch 1 \
    --data-root-pos "$DATA_ROOT_POS" --data-root-neg "$DATA_ROOT_NEG" \
    --init "$RESUME" ${SR_RESUME:+--sr-weights-file "$SR_RESUME"} \
    --output-path "${OUTPUT_PATH:-$root/output_end2end/stage5_stylegan_noising}" \
    "${@:2}"
