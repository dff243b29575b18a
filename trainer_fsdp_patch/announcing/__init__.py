"""What a run says of itself: a line when training starts, and figures in the log of a Trainer."""
