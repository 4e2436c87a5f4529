"""Trains seq2seq and autoencoder models on packed shards, on any number of processes."""

__version__ = "0.1.0"
