"""Image data: lists of files, decoding, sizes, perturbations, batches, the residual cache and the leak audit."""
