"""Class labels. The label of a class is also the index of the class in the logits."""

# Release: in the code of the paper's authors, label 1 means real. In most other detectors, label 1 means fake.
FAKE, REAL = 0, 1
LABEL_NAMES = ("fake", "real")
