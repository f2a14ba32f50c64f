"""Class labels. A label is also the number of its column in the logits."""

# Release: the released code uses label 1 for real images. Most other detectors use label 1 for fake images.
FAKE, REAL = 0, 1
LABEL_NAMES = ("fake", "real")
