"""What operators see: Grafana's dashboard and Prometheus' alerts, as files that are provisioned as they are."""
