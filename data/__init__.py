"""Modules that list, check, decode, resize, perturb and batch images, and store residuals on disk."""
