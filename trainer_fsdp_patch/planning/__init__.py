"""What a model holds, where each tensor goes, and the record of a planned model."""
