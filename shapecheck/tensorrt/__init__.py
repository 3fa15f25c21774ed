"""Profiles and engines of a contract: built, recorded, checked."""
