"""The data gate alone: all that can be said of a data set before a model sees it."""
