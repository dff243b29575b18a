"""From one step to the next: what a run keeps, or gives up again, by what its steps have left."""
