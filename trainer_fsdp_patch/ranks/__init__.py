"""What ranks send each other: gradients in buffers that stay, and digests that must agree."""
