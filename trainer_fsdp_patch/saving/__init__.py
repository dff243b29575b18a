"""From the live adapter to files that are proven."""
