"""From a checkpoint back to the live adapter and its optimizer."""
