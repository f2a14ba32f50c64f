"""Class labels, which are also the columns of the logits."""

FAKE, REAL = 0, 1  # Release: real is 1. Most of the field uses 1 for fake.
LABEL_NAMES = ("fake", "real")
