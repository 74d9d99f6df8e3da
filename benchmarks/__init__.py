"""What a step costs beside what users would run instead; `make bench` prints one table."""
