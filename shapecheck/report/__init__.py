"""How findings are told: tables for people, JSON for machines. Reads records only, never models."""
