"""What a run did: its summary and curves."""
