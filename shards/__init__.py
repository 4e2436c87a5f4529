"""Packs images, or images with code, into WebDataset tar shards. Never imports torch."""
