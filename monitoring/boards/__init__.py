"""Source of the dashboards in monitoring/dashboards. Nothing of it runs in a cluster."""
