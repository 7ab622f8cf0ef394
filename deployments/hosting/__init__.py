"""What every deployment shares."""
