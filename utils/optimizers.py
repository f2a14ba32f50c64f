"""Create the optimizer of train_detector.py, and compute its learning-rate schedules."""

import math

import torch
from torch import nn

from utils.errors import UserError
from utils.training import compute_cosine_learning_rate_factor

FINAL_RATE = 1e-4  # the authors' learning-rate schedule ends at this fraction of the base rate


def create_optimizer(
    name: str, detector: nn.Module, lr: float, classifier_rate_factor: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Create SGD or AdamW for the classifier and, if it is trained, the re-synthesizer of a detector.

    The re-synthesizer learns at the rate `lr`, and the classifier at the rate `lr * classifier_rate_factor`.

    Release: the authors' code instead multiplies the gradients of the classifier by `classifier_rate_factor` (option
    --lr-sr). With SGD, this gives exactly the same weights if the weight decay of the classifier is divided by
    `classifier_rate_factor`. AdamW does not add the weight decay to the gradients, so its weight decay is not divided.

    Args:
        name: "sgd" or "adamw".
        momentum: momentum of SGD.

    Raises:
        UserError: if `classifier_rate_factor` is 0, because the classifier would then not be trained.
    """
    if classifier_rate_factor == 0:
        raise UserError(
            "--lr-sr must be above 0: it is a factor on the learning rate of the classifier, despite its name"
        )
    classifier_decay = weight_decay / classifier_rate_factor if name == "sgd" else weight_decay
    groups = [
        {
            "params": list(detector.classifier.parameters()),
            "lr": lr * classifier_rate_factor,
            "weight_decay": classifier_decay,
        }
    ]
    resynthesizer = [p for p in detector.resynthesizer.parameters() if p.requires_grad]
    if resynthesizer:
        groups.append({"params": resynthesizer, "lr": lr, "weight_decay": weight_decay})
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum)
    return torch.optim.AdamW(groups)


def compute_authors_learning_rate_factor(epochs_total: int, epochs_done: float) -> float:
    """Compute the factor f by which the authors' code multiplies the base learning rate.

    The factor in epoch e of E epochs is f(e) = 0.9999 cos(pi/2 * e / (E - 1)) + 0.0001.

    Release: the authors' code sets the factor f(e) *after* epoch e, so that epochs 0 and 1 both use f(0) = 1.

    Args:
        epochs_total: E, number of epochs of the training.
        epochs_done: number of finished epochs, such as 2.5 in the middle of epoch 2.
    """
    epoch = max(int(epochs_done) - 1, 0)
    fraction = epoch / max(epochs_total - 1, 1)
    return (1 - FINAL_RATE) * math.cos(math.pi / 2 * fraction) + FINAL_RATE


# name of each learning-rate schedule (--schedule) -> function of the numbers of all epochs and of finished epochs
SCHEDULES = {"released": compute_authors_learning_rate_factor, "cosine": compute_cosine_learning_rate_factor}
