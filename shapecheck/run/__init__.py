"""How a contract is used: sessions that take torch tensors and check every call before it runs."""
