"""Shops, and what people say of them."""
