"""The version of imvar."""

VERSION = "0.1.0"
