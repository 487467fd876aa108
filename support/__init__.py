"""What tests, demo and benchmarks share: private servers and a generated site."""
