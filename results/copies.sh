# A function that the studies use. Each study runs `source copies.sh` after script/common.sh.

# make_copies IMAGES OUT: make copies of the images in IMAGES/train/real and IMAGES/val/real.
# OUT/twins holds copies by the autoencoder in AUTOENCODER or, if it is not set, up-sampled copies. OUT/upsampled holds
# up-sampled copies. Folders that exist already are kept.
make_copies() {
    local images=$1 out=$2 part
    for part in train val; do
        if [[ ! -d "$out/twins/$part" ]]; then
            "$PYTHON" -m tools.example --from "$images/$part/real" --out "$out/twins/$part" \
                ${AUTOENCODER:+--autoencoder $AUTOENCODER}
        fi
        if [[ ! -d "$out/upsampled/$part" ]]; then
            "$PYTHON" -m tools.example --from "$images/$part/real" --out "$out/upsampled/$part"
        fi
    done
}
