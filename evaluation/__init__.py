"""Score images with a trained detector, and turn score tables into metrics and figures."""

from evaluation.detector import Detector
from evaluation.loading import load
