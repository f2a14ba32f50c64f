"""Class labels. The label of a class is also the index of the class in the logits."""

# Release: the authors' code uses label 1 for real images. Most other detectors use label 1 for fake images.
FAKE, REAL = 0, 1
LABEL_NAMES = ("fake", "real")
