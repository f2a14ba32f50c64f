"""Modules that list, decode, resize, perturb and batch images, store residuals, and search image files for leaks."""
