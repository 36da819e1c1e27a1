"""The demos' harness and built-in text; each adapter's demo trains on it."""
