"""What a run is going to take of each rank, from configurations alone: no weights are read."""
