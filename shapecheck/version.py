"""The version of this package: read by the build, written into contracts, records and exported files."""

__version__ = "0.1.0"
