"""How a contract is learnt: real modules, run and watched."""
