"""What happens to a planned model from its first forward to its last step."""
