"""In place of servers, for tests of the heart; each is held to the real one by a shared suite."""
