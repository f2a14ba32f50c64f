"""Class labels. They are also the columns of the logits."""

FAKE, REAL = 0, 1  # labels, and columns of the logits. Release: real is 1; most of the field calls fake 1.
LABEL_NAMES = ("fake", "real")
