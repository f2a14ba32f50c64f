"""The optimizer of train_detector.py, and the learning-rate schedules of train_detector.py and train_sr.py."""

import math

import torch
from torch import nn

from utils.errors import UserError

FINAL_RATE = 1e-4  # smallest learning-rate factor in the schedule of the paper's authors
WARM_UP = 0.03  # length of the cosine schedule's warm-up, as a fraction of all epochs


def create_optimizer(
    name: str, detector: nn.Module, lr: float, classifier_rate_factor: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Create SGD or AdamW for a detector's classifier and the trainable parameters of its re-synthesizer.

    The re-synthesizer learns at the rate `lr`, and the classifier at the rate `lr * classifier_rate_factor`.

    Release: the code of the paper's authors uses the rate `lr` for all parameters, and multiplies the classifier's
    gradients by `classifier_rate_factor` (option --lr-sr). For SGD, this function divides the classifier's weight decay
    by `classifier_rate_factor`, so that SGD computes the same weights as the code of the paper's authors, up to
    rounding.

    Args:
        name: "sgd" or "adamw".

    Raises:
        UserError: if `classifier_rate_factor` is 0.
    """
    if classifier_rate_factor == 0:
        raise UserError("--lr-sr must be above 0, because the learning rate of the classifier is --lr times --lr-sr")
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


def get_learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the present learning rates of an optimizer, under the names with which they are logged.

    The name "learning_rate" stands for the rate of the classifier in train_detector.py, and for the rate of the
    re-synthesizer in train_sr.py.
    """
    names = ("learning_rate", "resynthesizer_learning_rate")
    return {name: group["lr"] for name, group in zip(names, optimizer.param_groups, strict=False)}


def compute_authors_learning_rate_factor(epochs_total: int, epochs_done: float) -> float:
    """Compute the factor on the base learning rate in the code of the paper's authors after `epochs_done` epochs.

    The factor is 1 in epoch 0, and 0.9999 cos(pi/2 * (e - 1) / (E - 1)) + 0.0001 in epoch e > 0, where E is
    `epochs_total`.

    Release: the code of the paper's authors sets the learning rate after each epoch, for the next epoch.

    Args:
        epochs_done: number of finished epochs, such as 2.5 in the middle of the third epoch.
    """
    epoch = max(int(epochs_done) - 1, 0)
    fraction = epoch / max(epochs_total - 1, 1)
    return (1 - FINAL_RATE) * math.cos(math.pi / 2 * fraction) + FINAL_RATE


def compute_cosine_learning_rate_factor(epochs_total: int, epochs: float) -> float:
    """Compute the factor by which the cosine schedule multiplies the base learning rate after `epochs` finished epochs.

    The factor rises linearly from 0 to 1 during the warm-up, and then falls to 0 along a cosine.
    """
    done = epochs / epochs_total
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


def compute_step_learning_rate_factor(decay: float, decay_epochs: int, epochs_done: float) -> float:
    """Compute the factor by which the schedule "steps" multiplies the base learning rate after `epochs_done` epochs.

    Args:
        decay: factor by which the learning rate is multiplied after every `decay_epochs` epochs.
    """
    return decay ** (int(epochs_done) // decay_epochs)


# SCHEDULES maps each value of train_detector.py's option --schedule to the function for the learning-rate factor.
SCHEDULES = {"released": compute_authors_learning_rate_factor, "cosine": compute_cosine_learning_rate_factor}
