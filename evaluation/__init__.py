"""Scoring with a trained detector, score tables, metrics and figures."""

from evaluation.detector import Detector
from evaluation.loading import load
