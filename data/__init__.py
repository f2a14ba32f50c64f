"""Images: lists of files, decoding, sizes, batches, patches, perturbations and generated examples."""
