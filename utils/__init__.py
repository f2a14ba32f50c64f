"""Code that all programs share: errors, signals, files, random numbers, options, checkpoints and training runs."""
