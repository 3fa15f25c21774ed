"""Run a contract's files: sessions that check every call, drop-ins for pipelines, the guard."""
