"""List, decode, resize, perturb and batch images, store their residuals, and search image files for leaks."""
