"""Source of the alerts and recording rules in monitoring/rules. Nothing of it runs in a cluster."""
