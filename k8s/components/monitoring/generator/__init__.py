"""Makes the dashboard and the PrometheusRule of this folder; see `__main__`."""
