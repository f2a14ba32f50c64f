"""For torch.hub.load(CHECKOUT, "detector", source="local", checkpoint="best.pth.tar")."""

dependencies = ["torch", "numpy", "PIL", "tqdm"]


def detector(checkpoint: str, **options):
    """A trained detector ready for use: `evaluation.detector.load`."""
    from evaluation import load

    return load(checkpoint, **options)
