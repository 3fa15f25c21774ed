"""Put to use: sessions in whole pipelines."""
