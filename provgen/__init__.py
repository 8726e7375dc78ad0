"""provgen: image generators that can name their sources."""

__version__ = "0.1.0"
