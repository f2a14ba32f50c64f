"""Modules that list, decode, resize, perturb and batch images, and store residuals on disk.

The module `leaks` finds properties of image files, such as the format, that differ between real and fake images.
"""
