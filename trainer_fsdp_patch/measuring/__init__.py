"""What FSDP takes of a rank, and what memory a rank has left."""
