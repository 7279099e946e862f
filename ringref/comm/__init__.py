"""Messages between ranks: the ring, its transports, and what starts ranks."""
