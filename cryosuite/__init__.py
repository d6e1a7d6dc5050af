"""cryosuite: heterogeneous cryo-EM from particle images to volumes, on the command line."""

__version__ = "0.1.0"
