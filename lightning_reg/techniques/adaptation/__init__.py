"""Techniques that adapt a trained model to the data that it is tested on."""
