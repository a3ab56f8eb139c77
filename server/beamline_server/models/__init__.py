"""A served model: its engine, put together for a bundle."""
