"""The release of this package, which the adapters that it writes carry."""

VERSION = "0.1.0"
