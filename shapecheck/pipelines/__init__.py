"""Put to use: drop-ins in whole pipelines, the road in one call, timings, a demonstration."""
