"""Reports: tables for people, JSON for machines. They read records only, never models."""
