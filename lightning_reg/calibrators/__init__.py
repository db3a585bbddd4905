"""Maps from a trained classifier's logits to calibrated ones, fitted on held-out data."""
