"""For torch.hub.load(CHECKOUT, "detector", source="local", checkpoint="best.pth.tar")."""

dependencies = ["torch", "numpy", "PIL", "tqdm"]


def detector(checkpoint: str, **options):
    """Load a trained detector. See `evaluation.load` for the arguments."""
    from evaluation import load

    return load(checkpoint, **options)
