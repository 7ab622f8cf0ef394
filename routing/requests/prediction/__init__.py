"""What requests will cost: lengths, pace, releases, margins."""
