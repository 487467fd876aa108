"""What a delivery came to, whose failure it is, and how it is settled and told."""
