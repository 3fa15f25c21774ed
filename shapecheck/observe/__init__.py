"""Observation: real modules, run and watched, give a contract."""
