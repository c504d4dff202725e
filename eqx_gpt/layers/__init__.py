"""The parts of a block, each a final Equinox module."""
